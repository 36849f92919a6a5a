"""The Transformer's layers and stacks, which are PyTorch's own, and models made of them."""

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import B, Case, Inputs, S, T, cases_of, ids
from experiments.torch_reference.shared import Outputs

D, N, MLP = 15, 3, 17
Mask: TypeAlias = torch.Tensor | None


def _options(
    activation: str = "relu", epsilon: float = 1e-5, norm_first: bool = False, use_bias: bool = True
) -> dict[str, Any]:
    """PyTorch's arguments."""
    return {
        "activation": activation,
        "layer_norm_eps": epsilon,
        "norm_first": norm_first,
        "bias": use_bias,
        "batch_first": True,
    }


def _encoder(
    features: int, num_heads: int, mlp_features: int, num_layers: int, **options: Any
) -> nn.TransformerEncoder:
    """As `nn.Transformer` makes it, but for nested tensors, which warn."""
    layer = nn.TransformerEncoderLayer(features, num_heads, mlp_features, **options)
    norm = nn.LayerNorm(features, options["layer_norm_eps"], bias=options["bias"])
    return nn.TransformerEncoder(layer, num_layers, norm, enable_nested_tensor=False)


class EncoderLayer(nn.TransformerEncoderLayer):
    """PyTorch's, in the port's arguments."""

    def __init__(self, features: int, num_heads: int, mlp_features: int, **options: Any) -> None:
        super().__init__(features, num_heads, mlp_features, **_options(**options))

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, attn_mask: Mask = None, key_padding_mask: Mask = None
    ) -> Outputs:
        """PyTorch's output."""
        return {"output": super().forward(x, attn_mask, key_padding_mask)}


class DecoderLayer(nn.TransformerDecoderLayer):
    """PyTorch's, in the port's arguments."""

    def __init__(self, features: int, num_heads: int, mlp_features: int, **options: Any) -> None:
        super().__init__(features, num_heads, mlp_features, **_options(**options))

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        attn_mask: Mask = None,
        memory_mask: Mask = None,
        key_padding_mask: Mask = None,
        memory_key_padding_mask: Mask = None,
    ) -> Outputs:
        """PyTorch's output."""
        masks = attn_mask, memory_mask, key_padding_mask, memory_key_padding_mask
        return {"output": super().forward(x, memory, *masks)}


class Encoder(nn.TransformerEncoder):
    """PyTorch's, of layers that differ."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_features: int,
        num_layers: int,
        final_norm: bool = False,
        **options: Any,
    ) -> None:
        layer = nn.TransformerEncoderLayer(features, num_heads, mlp_features, **_options(**options))
        norm = nn.LayerNorm(features) if final_norm else None
        super().__init__(layer, num_layers, norm, enable_nested_tensor=False)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, attn_mask: Mask = None, key_padding_mask: Mask = None
    ) -> Outputs:
        """PyTorch's output."""
        return {"output": super().forward(x, attn_mask, key_padding_mask)}


class Decoder(nn.TransformerDecoder):
    """PyTorch's, of layers that differ."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_features: int,
        num_layers: int,
        final_norm: bool = False,
        **options: Any,
    ) -> None:
        layer = nn.TransformerDecoderLayer(features, num_heads, mlp_features, **_options(**options))
        super().__init__(layer, num_layers, nn.LayerNorm(features) if final_norm else None)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        attn_mask: Mask = None,
        memory_mask: Mask = None,
        key_padding_mask: Mask = None,
        memory_key_padding_mask: Mask = None,
    ) -> Outputs:
        """PyTorch's output."""
        masks = attn_mask, memory_mask, key_padding_mask, memory_key_padding_mask
        return {"output": super().forward(x, memory, *masks)}


class Transformer(nn.Transformer):
    """PyTorch's, in the port's arguments."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        mlp_features: int,
        **options: Any,
    ) -> None:
        layers, arguments = (num_encoder_layers, num_decoder_layers), _options(**options)
        encoder = _encoder(features, num_heads, mlp_features, num_encoder_layers, **arguments)
        super().__init__(
            features, num_heads, *layers, mlp_features, custom_encoder=encoder, **arguments
        )

    def forward(  # type: ignore[override]
        self, source: torch.Tensor, target: torch.Tensor, **masks: Any
    ) -> Outputs:
        """PyTorch's output."""
        return {"output": super().forward(source, target, **masks)}


def sinusoidal(length: int, features: int) -> torch.Tensor:
    """P[i, 2j] = sin(i / 10000^(2j/D)), P[i, 2j+1] = cos(…)."""
    angles = torch.tensor(
        [[i / 10000 ** (2 * j / features) for j in range(features // 2)] for i in range(length)],
        dtype=torch.float64,
    )
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _padding(lengths: torch.Tensor | None, steps: int) -> torch.Tensor | None:
    return None if lengths is None else torch.arange(steps) >= lengths[:, None]


class FeatureEncoder(nn.Module):
    """A Linear, sinusoidal positions, and PyTorch's encoder."""

    def __init__(
        self,
        in_features: int,
        features: int,
        num_heads: int,
        num_layers: int,
        mlp_features: int,
        dropout_rate: float,
        norm_first: bool = False,
        positions: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.positions = positions
        self.embedding = nn.Linear(in_features, features)
        options = _options(norm_first=norm_first, activation=activation)
        layer = nn.TransformerEncoderLayer(
            features, num_heads, mlp_features, dropout_rate, **options
        )
        norm = nn.LayerNorm(features) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, num_layers, norm, enable_nested_tensor=False)

    def encode(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, C_in] → [B, T, D]."""
        x = self.embedding(x)
        if self.positions:
            x = x + sinusoidal(*x.shape[1:]).to(x.dtype)
        return self.encoder(x, src_key_padding_mask=_padding(lengths, x.shape[1]))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """The encoder's output [B, T, D]."""
        return {"output": self.encode(x, lengths)}


class FeatureClassifier(FeatureEncoder):
    """A Linear of the mean over the real steps."""

    def __init__(self, classes: int, features: int, **config: Any) -> None:
        super().__init__(features=features, **config)
        self.fc = nn.Linear(features, classes)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """Logits [B, C]."""
        outputs = self.encode(x, lengths)
        padding = _padding(lengths, x.shape[1])
        if lengths is None or padding is None:
            return {"logits": self.fc(outputs.mean(dim=1))}
        total = outputs.masked_fill(padding[..., None], 0).sum(dim=1)
        return {"logits": self.fc(total / lengths[:, None])}


class TokenEmbedding(nn.Module):
    """Embeddings times √D."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] → [B, T, D]."""
        return self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)


class Translator(nn.Module):
    """Embeddings, sinusoidal positions, `torch.nn.Transformer`, and a Linear for the logits."""

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        features: int,
        num_heads: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        mlp_features: int,
        norm_first: bool = False,
        tied: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.src_tok_emb = TokenEmbedding(source_vocabulary, features)
        self.tgt_tok_emb = TokenEmbedding(target_vocabulary, features)
        layers = num_encoder_layers, num_decoder_layers
        options = _options(norm_first=norm_first, activation=activation)
        encoder = _encoder(features, num_heads, mlp_features, num_encoder_layers, **options)
        self.transformer = nn.Transformer(
            features, num_heads, *layers, mlp_features, custom_encoder=encoder, **options
        )
        self.generator = nn.Linear(features, target_vocabulary, bias=not tied)
        if tied:
            self.generator.weight = self.tgt_tok_emb.embedding.weight

    def encode(self, source: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """What the decoder attends to [B, S, D]."""
        padding = _padding(lengths, source.shape[1])
        x = _positioned(self.src_tok_emb(source))
        return self.transformer.encoder(x, src_key_padding_mask=padding)

    def decode(
        self,
        target_in: torch.Tensor,
        memory: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, C]."""
        steps = target_in.shape[1]
        output = self.transformer.decoder(
            _positioned(self.tgt_tok_emb(target_in)),
            memory,
            tgt_mask=torch.ones(steps, steps, dtype=torch.bool).triu(1),
            memory_key_padding_mask=_padding(lengths, memory.shape[1]),
        )
        return self.generator(output)

    def forward(
        self, source: torch.Tensor, target_in: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> Outputs:
        """Teacher-forced logits [B, T, C]."""
        return {"logits": self.decode(target_in, self.encode(source, lengths), lengths)}


def _positioned(x: torch.Tensor) -> torch.Tensor:
    return x + sinusoidal(*x.shape[1:]).to(x.dtype)


LATER = np.triu(np.ones((T, T), bool), 1)
PAST_THE_END = np.arange(S) >= np.array([[3], [7]])
ENDS = np.arange(T) >= np.array([[5], [2]])


def cases() -> list[Case]:
    """Every case of the Transformer."""
    return [*layer_cases(), *stack_cases(), *model_cases()]


def layer_cases() -> list[Case]:
    """One layer, with all that masks it."""
    sizes: dict[str, Any] = {"features": D, "num_heads": N, "mlp_features": MLP}
    pre: dict[str, Any] = sizes | {"norm_first": True, "activation": "gelu"}
    plain: dict[str, Any] = sizes | {"use_bias": False, "epsilon": 0.1}
    x: Inputs = {"x": (B, T, D)}
    both: Inputs = x | {"memory": (B, S, D)}
    hidden: Inputs = {"attn_mask": LATER, "key_padding_mask": ENDS}
    past: Inputs = {"memory_key_padding_mask": PAST_THE_END}
    added: Inputs = {"attn_mask": (T, T), "memory_mask": (B * N, T, S)}
    return [
        *cases_of(
            "transformer/encoder_layer",
            EncoderLayer,
            encoder_layer=(sizes, x),
            encoder_layer_norm_first=(pre, x | hidden),
            encoder_layer_no_bias=(plain, x | {"attn_mask": (B * N, T, T)}),
            encoder_layer_unbatched=(sizes, {"x": (T, D), "attn_mask": (T, T)}),
        ),
        *cases_of(
            "transformer/decoder_layer",
            DecoderLayer,
            # The first draw that keeps every input of the ReLU 0.05 away from 0
            decoder_layer=(sizes, both | {"attn_mask": LATER}, 24),
            decoder_layer_norm_first=(pre, both | hidden | past),
            decoder_layer_no_bias=(plain, both | added),
        ),
    ]


def stack_cases() -> list[Case]:
    """Layers one after another, and both stacks together."""
    sizes: dict[str, Any] = {"features": D, "num_heads": N, "mlp_features": MLP, "num_layers": 2}
    pre: dict[str, Any] = sizes | {"norm_first": True, "final_norm": True}
    whole: dict[str, Any] = {
        "features": D,
        "num_heads": N,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "mlp_features": MLP,
    }
    x: Inputs = {"x": (B, T, D)}
    both: Inputs = x | {"memory": (B, S, D)}
    pair: Inputs = {"source": (B, S, D), "target": (B, T, D), "tgt_mask": LATER}
    padded: Inputs = {
        "src_key_padding_mask": PAST_THE_END,
        "memory_key_padding_mask": PAST_THE_END,
        "tgt_key_padding_mask": ENDS,
    }
    float_masks: Inputs = {"src_mask": (S, S), "tgt_mask": (T, T), "memory_mask": (T, S)}
    return [
        *cases_of(
            "transformer/encoder",
            Encoder,
            encoder=(sizes, x | {"key_padding_mask": ENDS}),
            encoder_norm_first=(pre, x),
        ),
        *cases_of(
            "transformer/decoder",
            Decoder,
            decoder=(sizes, both | {"memory_key_padding_mask": PAST_THE_END}),
            decoder_norm_first=(pre, both | {"attn_mask": LATER}),
        ),
        *cases_of(
            "transformer/transformer",
            Transformer,
            transformer=(whole, pair | padded),
            transformer_norm_first=(whole | {"norm_first": True, "activation": "gelu"}, pair),
            transformer_float_masks=(whole | {"use_bias": False}, pair | float_masks),
        ),
    ]


FEATURES: dict[str, Any] = {
    "in_features": 7,
    "features": 12,
    "num_heads": 3,
    "num_layers": 2,
    "mlp_features": MLP,
}


def model_cases() -> list[Case]:
    """Models made of the stacks."""
    encoder, x = FEATURES | {"dropout_rate": 0.1}, (B, T, 7)
    lengths: Inputs = {"x": x, "lengths": np.array([2, 5])}
    translator: dict[str, Any] = {
        "source_vocabulary": 13,
        "target_vocabulary": 17,
        "features": 12,
        "num_heads": 3,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "mlp_features": 19,
    }
    tokens: Inputs = {
        "source": ids([3, 1, 12, 4, 0, 0], [7, 7, 2, 9, 11, 5], [1, 0, 0, 0, 0, 0]),
        "target_in": ids([1, 16, 2, 9], [1, 5, 5, 11], [1, 8, 0, 0]),
    }
    padded: Inputs = tokens | {"lengths": np.array([4, 6, 1])}
    return [
        *cases_of(
            "transformer/feature_encoder",
            FeatureEncoder,
            feature_encoder=(encoder, {"x": x}),
            feature_encoder_lengths=(encoder | {"positions": False}, lengths),
            feature_encoder_norm_first=(encoder | {"norm_first": True}, lengths),
        ),
        *cases_of(
            "transformer/feature_classifier",
            FeatureClassifier,
            feature_classifier=(encoder | {"classes": 5}, {"x": x}),
            feature_classifier_lengths=(encoder | {"classes": 5}, lengths),
        ),
        *cases_of(
            "transformer/translator",
            Translator,
            translator=(translator, tokens),
            translator_lengths=(translator | {"norm_first": True, "activation": "gelu"}, padded),
            translator_tied=(translator | {"tied": True}, padded),
        ),
    ]
