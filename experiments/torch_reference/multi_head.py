"""Heads, and multi-head attention with wide, grouped or shared key/value heads."""

from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import (
    LENGTHS,
    LENGTHS_PER_QUERY,
    B,
    Case,
    Inputs,
    S,
    T,
    cases_of,
)
from experiments.torch_reference.shared import (
    Outputs,
    allowed_by_lengths,
    attend_heads,
    masked_softmax,
)


class HeadSplit(nn.Module):
    """[B, T, N·H] to heads, to the folded form, and back."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        """Split [B, T, N, H], folded [B·N, T, H], lengths [B·N], and its squares, merged."""
        batch, length, _ = x.shape
        split = x.reshape(batch, length, self.num_heads, -1)
        folded = split.permute(0, 2, 1, 3).reshape(batch * self.num_heads, length, -1)
        unfolded = (folded**3).reshape(batch, self.num_heads, length, -1).permute(0, 2, 1, 3)
        return {
            "split": split,
            "merged": (split**2).reshape(batch, length, -1),
            "folded": folded,
            "unfolded": unfolded,
            "lengths": torch.repeat_interleave(lengths, self.num_heads, dim=0),
        }


class MultiHeadAttention(nn.Module):
    """Concat(headᵢ) W_o; G = N/K query heads share a key/value head."""

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        in_value_features: int | None = None,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        width = qkv_features or in_features
        kv_width = width // num_heads * self.num_kv_heads
        self.W_q = nn.Linear(in_features, width, bias=use_bias)
        self.W_k = nn.Linear(in_kv_features or in_features, kv_width, bias=use_bias)
        self.W_v = nn.Linear(
            in_value_features or in_kv_features or in_features, kv_width, bias=use_bias
        )
        self.W_o = nn.Linear(width, out_features or in_features, bias=use_bias)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> Outputs:
        """Output [B, T, D] and weights [B, N, T, S]; lengths [B] or [B, T]."""
        key = query if key is None else key
        value = key if value is None else value
        shared = self.num_heads // self.num_kv_heads
        queries = self.heads(self.W_q(query), self.num_heads)
        keys = self.heads(self.W_k(key), self.num_kv_heads).repeat_interleave(shared, dim=1)
        values = self.heads(self.W_v(value), self.num_kv_heads).repeat_interleave(shared, dim=1)
        allowed = None if lengths is None else allowed_by_lengths(lengths, key.shape[1])[:, None]
        weights = masked_softmax(
            queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5, allowed
        )
        pooled = self.dropout(weights) @ values
        return {"output": self.W_o(pooled.transpose(1, 2).flatten(start_dim=2)), "weights": weights}

    @staticmethod
    def heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
        """[B, T, N·H] → [B, N, T, H]."""
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class ToGroupedQuery(MultiHeadAttention):
    """Weights of N key/value heads, of which each K-th part of consecutive ones is its mean."""

    def __init__(self, num_heads: int, in_features: int, pooled: int, use_bias: bool) -> None:
        super().__init__(num_heads, in_features, use_bias=use_bias)
        self.pooled = pooled

    def forward(self, query: torch.Tensor) -> Outputs:  # type: ignore[override]
        """Output [B, T, D] and weights [B, N, T, T] of the grouped attention."""
        pooled = {
            name: parameter.unflatten(0, (self.pooled, self.num_heads // self.pooled, -1))
            .mean(dim=1)
            .flatten(0, 1)
            for name, parameter in self.named_parameters()
            if name.startswith(("W_k", "W_v"))
        }
        grouped = MultiHeadAttention(
            self.num_heads, query.shape[-1], num_kv_heads=self.pooled,
            use_bias=self.W_q.bias is not None,
        )  # fmt: skip
        parameters = dict(self.named_parameters()) | pooled
        return torch.func.functional_call(grouped, parameters, (query,))


class WideHeads(nn.Module):
    """Every head is as wide as the output, whatever the width of the input; scale √H."""

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int,
        head_features: int,
        use_bias: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.W_q = nn.Linear(in_features, num_heads * head_features, bias=use_bias)
        self.W_k = nn.Linear(in_features, num_heads * head_features, bias=use_bias)
        self.W_v = nn.Linear(in_features, num_heads * head_features, bias=use_bias)
        self.W_o = nn.Linear(num_heads * head_features, out_features, bias=use_bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> Outputs:
        """Query [B, T, D], key (and value) [B, S, D] → output [B, T, H], weights [B, N, T, S]."""
        key = query if key is None else key
        projected = (self.W_q(query), self.W_k(key), self.W_v(key))
        heads = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        pooled, weights = attend_heads(*heads, lengths=lengths)
        return {"output": self.W_o(pooled), "weights": weights}


class TorchMultiheadAttention(nn.MultiheadAttention):
    """PyTorch's; whether weights are averaged is set beforehand."""

    def __init__(self, average: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.average = average

    def forward(self, **inputs: Any) -> Outputs:  # type: ignore[override]
        """PyTorch's outputs."""
        output, weights = super().forward(**inputs, average_attn_weights=self.average)
        assert weights is not None
        return {"output": output, "weights": weights}


LENGTHS_ALONE: Inputs = {"lengths": LENGTHS}
PER_QUERY: Inputs = {"lengths": LENGTHS_PER_QUERY}
SEPARATE: Inputs = {"query": (B, T, 13), "key": (B, S, 17), "value": (B, S, 19)}
WIDTHS = {"in_features": 13, "in_kv_features": 17, "in_value_features": 19}
BIAS, NO_BIAS = {"use_bias": True}, {"use_bias": False}


def cases() -> list[Case]:
    """Every case of heads and multi-head attention."""
    return [*multi_head_cases(), *torch_cases(), *wide_head_cases(), *shared_head_cases()]


def multi_head_cases() -> list[Case]:
    """Heads, and attention whose heads are all its own."""
    one: dict[str, Any] = {"num_heads": 3, "in_features": 33, "dropout_rate": 0.5}
    widths = WIDTHS | {"num_heads": 3, "qkv_features": 33, "out_features": 33}
    return [
        *cases_of(
            "multi_head/head_split",
            HeadSplit,
            heads=({"num_heads": 3}, {"x": (B, T, 33), **LENGTHS_ALONE}),
            heads_per_query=({"num_heads": 7}, {"x": (B, T, 35), **PER_QUERY}),
        ),
        *cases_of(
            "multi_head/attention",
            MultiHeadAttention,
            self_attention=(one | NO_BIAS, {"query": (B, T, 33)}),
            widths=(widths | NO_BIAS, SEPARATE),
            widths_bias_lengths=(widths | BIAS, SEPARATE | LENGTHS_ALONE),
            widths_lengths_per_query=(widths | NO_BIAS, SEPARATE | PER_QUERY),
        ),
    ]


def torch_cases() -> list[Case]:
    """PyTorch's own module, with all of its arguments and masks."""
    E, N = 15, 3
    sizes: dict[str, Any] = {"embed_dim": E, "num_heads": N, "dropout": 0.5}
    first, each = {"batch_first": True}, {"average": False}
    widths: dict[str, Any] = sizes | {"kdim": 13, "vdim": 17}
    times: Inputs = {"query": (T, B, E), "key": (S, B, E), "value": (S, B, E)}
    batches: Inputs = {"query": (B, T, E), "key": (B, S, E), "value": (B, S, E)}
    unbatched: Inputs = {"query": (T, E), "key": (S, E), "value": (S, E)}
    later, past = np.triu(np.ones((T, S), bool), 1), np.arange(S) >= LENGTHS[:, None]
    appended = {"add_bias_kv": True, "add_zero_attn": True}
    return [
        *cases_of(
            "multi_head/torch",
            TorchMultiheadAttention,
            torch=(sizes, times),
            torch_hidden=(
                sizes | {"bias": False},
                times | {"attn_mask": later, "key_padding_mask": past},
            ),
            torch_added=(
                sizes | first | each,
                batches | {"attn_mask": (B * N, T, S), "key_padding_mask": (B, S)},
            ),
            torch_appended=(
                sizes | appended | each,
                times | {"attn_mask": later, "key_padding_mask": past},
            ),
            torch_unbatched=(sizes | {"add_bias_kv": True}, unbatched | {"attn_mask": (N, T, S)}),
        ),
        *cases_of(
            "multi_head/torch_widths",
            TorchMultiheadAttention,
            torch_widths=(
                widths | {"add_zero_attn": True},
                {"query": (T, B, E), "key": (S, B, 13), "value": (S, B, 17)},
            ),
        ),
    ]


def wide_head_cases() -> list[Case]:
    """Heads as wide as the output."""
    wide = {"num_heads": 3, "in_features": 13, "head_features": 11, "out_features": 11}
    query: Inputs = {"query": (B, T, 13)}
    return [
        *cases_of(
            "multi_head/wide_heads",
            WideHeads,
            wide_heads=(wide | NO_BIAS, query),
            wide_heads_bias_lengths=(wide | BIAS, query | {"lengths": np.array([3, 5])}),
            wide_heads_key=(wide | NO_BIAS, query | {"key": (B, S, 13)} | LENGTHS_ALONE),
        ),
    ]


def shared_head_cases() -> list[Case]:
    """Key/value heads that several query heads, or all, share."""
    grouped = {"num_heads": 6, "num_kv_heads": 2}
    grouped_widths = WIDTHS | grouped | {"qkv_features": 30, "out_features": 30}
    pooled = {"num_heads": 6, "in_features": 30, "pooled": 2}
    shared = {"num_heads": 5, "num_kv_heads": 1}
    shared_widths = WIDTHS | shared | {"qkv_features": 35, "out_features": 35}
    return [
        *cases_of(
            "multi_head/grouped_query",
            MultiHeadAttention,
            grouped_query=(grouped | {"in_features": 30} | NO_BIAS, {"query": (B, T, 30)}),
            grouped_query_bias=(grouped_widths | BIAS, SEPARATE | LENGTHS_ALONE),
        ),
        *cases_of(
            "multi_head/to_grouped_query",
            ToGroupedQuery,
            to_grouped_query=(pooled | NO_BIAS, {"query": (B, T, 30)}),
            to_multi_query_bias=(pooled | {"pooled": 1} | BIAS, {"query": (B, T, 30)}),
        ),
        *cases_of(
            "multi_head/multi_query",
            MultiHeadAttention,
            multi_query=(shared | {"in_features": 35} | NO_BIAS, {"query": (B, T, 35)}),
            multi_query_bias=(shared_widths | BIAS, SEPARATE | PER_QUERY),
        ),
    ]
