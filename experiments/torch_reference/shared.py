"""What references share: masked softmax, attention of heads, networks over padded sequences."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Outputs = dict[str, torch.Tensor]


def allowed_by_lengths(lengths: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Lengths [B] or [B, T] → boolean [B, 1 or T, S]: position s is seen when s < length."""
    if lengths.dim() == 1:
        lengths = lengths[:, None]
    return torch.arange(num_keys) < lengths[:, :, None]


def masked_softmax(scores: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax over the last axis; hidden positions and rows with nothing to see get exactly 0.

    The popular code fills hidden scores with −1e6, which makes an empty row uniform.
    """
    if allowed is None:
        return torch.softmax(scores, dim=-1)
    allowed = allowed.expand(scores.shape)
    some = allowed.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~allowed & some, float("-inf")), dim=-1)
    return weights.masked_fill(~allowed, 0.0)


def attend_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads [B, N, T, H], lengths [B] or [B, T] → pooled [B, T, N·H] and weights [B, N, T, S].

    The scale is 1/√H by default.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    allowed = None if lengths is None else allowed_by_lengths(lengths, key.shape[2])[:, None]
    weights = masked_softmax(query @ key.transpose(-1, -2) * scale, allowed)
    return (weights @ value).transpose(1, 2).flatten(start_dim=2), weights


def run_packed(
    rnn: nn.RNNBase, x: torch.Tensor, state: Any, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, Any]:
    """Runs over x [B, T, D], packed where lengths [B] are given.

    Returns outputs [B, T, F] and state [L, B, F].
    """
    if lengths is None:
        return rnn(x, state)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, state = rnn(packed, state)
    return pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], state
