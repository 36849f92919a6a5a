"""Rows 9, 10, 15 and 16: heads, multi-head, grouped-query and multi-query attention."""

import torch
from torch import nn

from experiments.torch_reference.pooling import Outputs, allowed_by_lengths, masked_softmax


class HeadSplit(nn.Module):
    """Row 9: [B, T, N·H] to heads, to the folded form, and back."""

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
    """Rows 10, 15, 16: Concat(headᵢ) W_O; G = N/K query heads share a key/value head."""

    def __init__(
        self,
        num_heads: int,
        features: int,
        query_features: int | None = None,
        key_features: int | None = None,
        value_features: int | None = None,
        num_kv_heads: int | None = None,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        kv_width = features // num_heads * self.num_kv_heads
        self.W_q = nn.Linear(query_features or features, features, bias=use_bias)
        self.W_k = nn.Linear(key_features or features, kv_width, bias=use_bias)
        self.W_v = nn.Linear(value_features or features, kv_width, bias=use_bias)
        self.W_o = nn.Linear(features, features, bias=use_bias)
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
