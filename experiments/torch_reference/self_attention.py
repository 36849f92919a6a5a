"""Rows 12, 13, 14, 18: wide heads, a shared projection, one head, and the residual around it."""

import torch
from torch import nn

from experiments.torch_reference.pooling import Outputs, allowed_by_lengths, masked_softmax


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads [B, N, T, H], lengths [B] or [B, T] → pooled [B, T, N·H] and weights [B, N, T, S]."""
    allowed = None if lengths is None else allowed_by_lengths(lengths, key.shape[2])[:, None]
    weights = masked_softmax(query @ key.transpose(-1, -2) * scale, allowed)
    return (weights @ value).transpose(1, 2).flatten(start_dim=2), weights


class WideHeads(nn.Module):
    """Row 12: every head is as wide as the output, whatever the width of the input; scale √H."""

    def __init__(
        self, num_heads: int, in_features: int, head_features: int, use_bias: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.head_features = num_heads, head_features
        self.W_q = nn.Linear(in_features, num_heads * head_features, bias=use_bias)
        self.W_k = nn.Linear(in_features, num_heads * head_features, bias=use_bias)
        self.W_v = nn.Linear(in_features, num_heads * head_features, bias=use_bias)
        self.W_o = nn.Linear(num_heads * head_features, head_features, bias=use_bias)

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
        pooled, weights = attend(*heads, scale=self.head_features**-0.5, lengths=lengths)
        return {"output": self.W_o(pooled), "weights": weights}


class SharedProjectionAttention(nn.Module):
    """Row 13: one projection of width D/N for all heads.

    The popular code builds W_q, W_k and W_v, and never calls them.
    """

    def __init__(self, num_heads: int, features: int, scale: float | None = None) -> None:
        super().__init__()
        width = features // num_heads
        self.num_heads, self.scale = num_heads, width**-0.5 if scale is None else scale
        self.W_q = nn.Linear(width, width, bias=False)
        self.W_k = nn.Linear(width, width, bias=False)
        self.W_v = nn.Linear(width, width, bias=False)
        self.W_o = nn.Linear(features, features)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """x [B, T, D] → output [B, T, D] and weights [B, N, T, T]."""
        slices = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        heads = (projection(slices) for projection in (self.W_q, self.W_k, self.W_v))
        pooled, weights = attend(*heads, scale=self.scale, lengths=lengths)
        return {"output": self.W_o(pooled), "weights": weights}


class SelfAttention(nn.Module):
    """Row 14: one head, no output projection."""

    def __init__(self, in_features: int, features: int, use_bias: bool = True) -> None:
        super().__init__()
        self.features = features
        self.W_q = nn.Linear(in_features, features, bias=use_bias)
        self.W_k = nn.Linear(in_features, features, bias=use_bias)
        self.W_v = nn.Linear(in_features, features, bias=use_bias)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """x [B, T, D] → output [B, T, H] and weights [B, T, T]."""
        heads = (projection(x)[:, None] for projection in (self.W_q, self.W_k, self.W_v))
        pooled, weights = attend(*heads, scale=self.features**-0.5, lengths=lengths)
        return {"output": pooled, "weights": weights[:, 0]}


class ResidualAttention(nn.Module):
    """Row 18: z = x + attention(x), with a Linear skip where widths differ; a LayerNorm at will."""

    def __init__(self, in_features: int, out_features: int, use_layer_norm: bool = False) -> None:
        super().__init__()
        self.attention = SelfAttention(in_features, out_features)
        self.skip = (
            nn.Identity() if in_features == out_features else nn.Linear(in_features, out_features)
        )
        self.norm = nn.LayerNorm(out_features) if use_layer_norm else nn.Identity()

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """x [B, T, D] → output [B, T, F] and weights [B, T, T]."""
        attended = self.attention(x, lengths)
        return {
            "output": self.norm(self.skip(x) + attended["output"]),
            "weights": attended["weights"],
        }
