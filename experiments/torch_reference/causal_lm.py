"""A causal language model of the Llama family, with the weights' names of `transformers`."""

from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference import ropes
from experiments.torch_reference.cases import Case, Inputs, cases_of, ids
from experiments.torch_reference.positions import ROPES
from experiments.torch_reference.shared import Outputs, masked_softmax

Config = dict[str, Any]
PLAIN: Config = {  # what a config need not say
    "num_kv_heads": None,
    "head_features": None,
    "rope": ROPES["default"],
    "window": None,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "normalize_qk": False,
    "epsilon": 1e-6,
    "tied": False,
}


class RMSNorm(nn.Module):
    """weight · x / √(mean x² + ε), in the dtype of x."""

    def __init__(self, features: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(features)), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last axis."""
        return self.weight * x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon)


class Attention(nn.Module):
    """Query head n reads key/value head n // (N / K)."""

    def __init__(self, config: Config, window: int | None) -> None:
        super().__init__()
        D, N, epsilon = config["features"], config["num_heads"], config["epsilon"]
        H, K = config["head_features"] or D // N, config["num_kv_heads"] or N
        bias, self.width, self.window = config["qkv_bias"], H, window
        self.q_proj = nn.Linear(D, N * H, bias=bias)
        self.k_proj = nn.Linear(D, K * H, bias=bias)
        self.v_proj = nn.Linear(D, K * H, bias=bias)
        self.o_proj = nn.Linear(N * H, D, bias=config["out_bias"])
        self.q_norm, self.k_norm = (
            RMSNorm(H, epsilon) if config["normalize_qk"] else nn.Identity() for _ in range(2)
        )

    def forward(self, x: torch.Tensor, wave: torch.Tensor) -> torch.Tensor:
        """x [B, T, D]: token i sees the tokens i − W < j ≤ i."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = ropes.turn(self.q_norm(query), wave), ropes.turn(self.k_norm(key), wave)
        shared = query.shape[2] // key.shape[2]
        key, value = (each.repeat_interleave(shared, dim=2) for each in (key, value))
        scores = torch.einsum("btnh, bsnh -> bnts", query, key) / self.width**0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if self.window is not None:
            seen &= seen.triu(1 - self.window)
        pooled = torch.einsum("bnts, bsnh -> btnh", masked_softmax(scores, seen), value)
        return self.o_proj(pooled.flatten(start_dim=2))


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, features: int, mlp_features: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(features, mlp_features, bias=bias)
        self.up_proj = nn.Linear(features, mlp_features, bias=bias)
        self.down_proj = nn.Linear(mlp_features, features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token by token."""
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and a network, each normalised before and added after."""

    def __init__(self, config: Config, window: int | None) -> None:
        super().__init__()
        D, epsilon = config["features"], config["epsilon"]
        self.self_attn = Attention(config, window)
        self.mlp = FeedForward(D, config["mlp_features"], config["mlp_bias"])
        self.input_layernorm = RMSNorm(D, epsilon)
        self.post_attention_layernorm = RMSNorm(D, epsilon)

    def forward(self, x: torch.Tensor, wave: torch.Tensor) -> torch.Tensor:
        """[B, T, D] → [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), wave)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        windows = config["window"]
        if not isinstance(windows, list):
            windows = [windows] * config["num_layers"]
        self.embed_tokens = nn.Embedding(config["vocabulary"], config["features"])
        self.layers = nn.ModuleList(Layer(config, window) for window in windows)
        self.norm = RMSNorm(config["features"], config["epsilon"])

    def forward(self, tokens: torch.Tensor, wave: torch.Tensor) -> torch.Tensor:
        """[B, T] → [B, T, D]."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, wave)
        return self.norm(x)


class CausalLM(nn.Module):
    """The stack, and a Linear to the logits of the next token."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        config = PLAIN | config
        self.rope = config["rope"]
        self.width = config["head_features"] or config["features"] // config["num_heads"]
        self.model = Stack(config)
        self.lm_head = nn.Linear(config["features"], config["vocabulary"], bias=False)
        if config["tied"]:
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, C]; positions [T] or [B, T] are those of the rotation."""
        positions = torch.arange(tokens.shape[1]) if positions is None else positions
        return self.lm_head(self.model(tokens, ropes.waves(positions, self.rope, self.width)))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> Outputs:
        """Logits [B, T, C]."""
        return {"logits": self.logits(tokens, positions)}


class Decoder(CausalLM):
    """One pass over all tokens; a port that takes them in chunks, with a cache, gives the same.

    The first chunk is a padded prompt where lengths say so. Then the rest of an example follows its
    last real token, and the logits of its padding are 0.
    """

    def __init__(self, chunks: list[int], **config: Any) -> None:
        super().__init__(**config)
        self.chunks = chunks

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:  # type: ignore[override]
        """Logits [B, T, C] for tokens [B, T] and lengths [B] of the first chunk."""
        if lengths is None:
            return {"logits": self.logits(tokens)}
        is_real = torch.arange(tokens.shape[1]) >= self.chunks[0]
        rows = []
        for example, length in zip(tokens, lengths.tolist(), strict=True):
            real = is_real | (torch.arange(len(example)) < length)
            row = torch.zeros(len(example), self.lm_head.out_features).to(self.lm_head.weight)
            row[real] = self.logits(example[None, real])[0]
            rows.append(row)
        return {"logits": torch.stack(rows)}


TOKENS: Inputs = {"tokens": ids([3, 1, 12, 4, 0, 5, 9], [7, 7, 2, 9, 11, 10, 8])}
SMALL: Config = {
    "vocabulary": 13,
    "features": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_features": 11,
}
WIDE: Config = SMALL | {"features": 5, "head_features": 6}
TURNED: Config = SMALL | {  # heads as wide as LongRope's factors; D is a multiple of N, as Llama's
    "features": 6,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_features": 14,
}
FORMS: dict[str, Config] = {
    "llama": SMALL | {"epsilon": 1e-5},
    "llama3": TURNED | {"rope": ROPES["llama3"], "tied": True},
    "mistral": SMALL | {"window": 3},
    "qwen2": WIDE | {"qkv_bias": True, "window": [None, 3]},
    "qwen3": WIDE | {"normalize_qk": True, "tied": True},
    "all_biases": SMALL | {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}


def cases() -> list[Case]:
    """Every case of the causal language model."""
    short = {"rope": ROPES["dynamic"] | {"max_length": 5}}
    stretched = {"rope": ROPES["longrope"] | {"original_length": 4}}
    later: Inputs = {"positions": np.array([[0, 1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 400, 401, 402]])}
    padded: Inputs = TOKENS | {"lengths": np.array([2, 4])}
    return [
        *cases_of(
            "causal_lm/model",
            CausalLM,
            **{name: (form, TOKENS) for name, form in FORMS.items()},
            positions=(TURNED, TOKENS | later),
            linear=(TURNED | {"rope": ROPES["linear"]}, TOKENS),
            dynamic=(TURNED | short, TOKENS),
            yarn=(TURNED | {"rope": ROPES["yarn"]}, TOKENS),
            longrope=(TURNED | stretched, TOKENS),
        ),
        *cases_of(
            "causal_lm/decode",
            Decoder,
            decode=(FORMS["llama"] | {"chunks": [4, 1, 1, 1]}, TOKENS),
            decode_window=(FORMS["mistral"] | {"chunks": [1, 4, 1, 1]}, TOKENS),
            decode_windows=(FORMS["qwen2"] | {"chunks": [5, 1, 1]}, TOKENS),
            decode_lengths=(FORMS["mistral"] | {"chunks": [4, 2, 1]}, padded),
            decode_dynamic=(TURNED | short | {"chunks": [3, 2, 2]}, TOKENS),
            decode_longrope=(TURNED | stretched | {"chunks": [3, 2, 2]}, TOKENS),
        ),
    ]
