"""Self-attention of one head, of heads that share a projection, and with a residual around it."""

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import LENGTHS_PER_QUERY, B, Case, Inputs, T, cases_of
from experiments.torch_reference.shared import Outputs, attend_heads


class SharedProjectionAttention(nn.Module):
    """One projection of width D/N for all heads.

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
        pooled, weights = attend_heads(*heads, scale=self.scale, lengths=lengths)
        return {"output": self.W_o(pooled), "weights": weights}


class SelfAttention(nn.Module):
    """One head, no output projection."""

    def __init__(self, in_features: int, features: int, use_bias: bool = True) -> None:
        super().__init__()
        self.features = features
        self.W_q = nn.Linear(in_features, features, bias=use_bias)
        self.W_k = nn.Linear(in_features, features, bias=use_bias)
        self.W_v = nn.Linear(in_features, features, bias=use_bias)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """x [B, T, D] → output [B, T, H] and weights [B, T, T]."""
        heads = (projection(x)[:, None] for projection in (self.W_q, self.W_k, self.W_v))
        pooled, weights = attend_heads(*heads, lengths=lengths)
        return {"output": pooled, "weights": weights[:, 0]}


class ResidualAttention(nn.Module):
    """z = x + attention(x), with a Linear skip where widths differ; a LayerNorm at will."""

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


def cases() -> list[Case]:
    """Every case of self-attention with one head, shared projections or a residual."""
    slices, one = {"num_heads": 3, "features": 33}, {"in_features": 13, "features": 11}
    same, other = ({"in_features": 13, "out_features": width} for width in (13, 11))
    norm = {"use_layer_norm": True}
    x: Inputs = {"x": (B, T, 13)}
    sliced: Inputs = {"x": (B, T, 33)}
    lengths: Inputs = {"lengths": np.array([3, 5])}
    per_query: Inputs = {"lengths": np.minimum(LENGTHS_PER_QUERY, T)}
    return [
        *cases_of(
            "self_attention/shared_projection",
            SharedProjectionAttention,
            shared_projection=(slices, sliced),
            shared_projection_lengths=(slices, sliced | per_query),
            shared_projection_scale=(slices | {"scale": 33**-0.5}, sliced | lengths),
        ),
        *cases_of(
            "self_attention/single_head",
            SelfAttention,
            single_head=(one, x),
            single_head_lengths=(one, x | lengths),
            single_head_no_bias=(one | {"use_bias": False}, x | per_query),
        ),
        *cases_of(
            "self_attention/residual",
            ResidualAttention,
            residual=(same, x | lengths),
            residual_norm=(same | norm, x),
            residual_widths=(other, x),
            residual_widths_norm_lengths=(other | norm, x | lengths),
        ),
    ]
