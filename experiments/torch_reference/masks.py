"""The masked softmax, and scaled dot-product attention under masks."""

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import (
    LENGTHS,
    LENGTHS_PER_QUERY,
    QUERY_KEY_VALUE,
    B,
    Case,
    Inputs,
    S,
    T,
    cases_of,
    ids,
)
from experiments.torch_reference.pooling import DotProductAttention
from experiments.torch_reference.shared import Outputs, allowed_by_lengths, masked_softmax


class MaskedSoftmax(nn.Module):
    """Softmax that gives hidden positions exactly 0."""

    def forward(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> Outputs:
        """Scores [B, T, S]; lengths [B] or [B, T], or a boolean mask, True where it may be seen."""
        if lengths is not None:
            mask = allowed_by_lengths(lengths, scores.shape[-1])
        return {"weights": masked_softmax(scores, mask)}


class MaskedAttention(DotProductAttention):
    """Scaled dot-product attention under a mask; each kind is a comparison of indices."""

    def __init__(self, mask: str, offset: int = 0, left: int = 0, right: int = 0) -> None:
        super().__init__()
        self.mask, self.offset, self.left, self.right = mask, offset, left, right

    def allowed(
        self,
        i: torch.Tensor,
        j: torch.Tensor,
        lengths: torch.Tensor | None,
        query_ids: torch.Tensor | None,
        key_ids: torch.Tensor | None,
        dense: torch.Tensor | None,
    ) -> torch.Tensor:
        """Query index i [T, 1] and key index j [1, S] → True where i may see j."""
        causal = j <= i + self.offset
        window = (i - self.left <= j) & (j <= i + self.right)
        padding = None if lengths is None else allowed_by_lengths(lengths, j.shape[-1])
        match self.mask:
            case "padding" if padding is not None:
                return padding
            case "prefix_lm" if padding is not None:
                return causal | padding
            case "causal & padding" if padding is not None:
                return causal & padding
            case "~window | causal & ~no_self":
                return ~window | (causal & (i != j))
            case "segments" if query_ids is not None and key_ids is not None:
                return query_ids[:, :, None] == key_ids[:, None, :]
            case "dense" if dense is not None:
                return dense
        return {"causal": causal, "sliding_window": window, "no_self": i != j}[self.mask]

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        key_ids: torch.Tensor | None = None,
        dense: torch.Tensor | None = None,
    ) -> Outputs:
        """Pools under the mask."""
        i, j = torch.arange(query.shape[1])[:, None], torch.arange(key.shape[1])[None, :]
        return self.pool(query, key, value, self.allowed(i, j, lengths, query_ids, key_ids, dense))


def some(*shape: int) -> np.ndarray:
    """A boolean mask in which about two entries of three are True."""
    return np.random.default_rng(0).random(shape) < 0.66


def cases() -> list[Case]:
    """Every case of the masked softmax and of masks."""
    scores: Inputs = {"scores": (B, T, S)}
    with_empty_row = some(B, T, S)
    with_empty_row[1, 2] = False
    segments: Inputs = {
        "query_ids": ids([0, 0, 1, 1, 3], [2, 2, 1, 0, 0]),
        "key_ids": ids([0] * 3 + [1] * 4, [0, 1] * 3 + [2]),
    }
    whole: Inputs = QUERY_KEY_VALUE
    lengths: Inputs = {"lengths": LENGTHS}
    per_query: Inputs = {"lengths": LENGTHS_PER_QUERY}
    algebra = {"mask": "~window | causal & ~no_self", "left": 1, "right": 2}
    return [
        *cases_of(
            "masks/masked_softmax",
            MaskedSoftmax,
            masked_softmax=({}, scores),
            masked_softmax_lengths=({}, scores | lengths),
            masked_softmax_lengths_per_query=({}, scores | per_query),
            masked_softmax_mask=({}, scores | {"mask": with_empty_row}),
        ),
        *cases_of(
            "masks/mask_algebra",
            MaskedAttention,
            padding=({"mask": "padding"}, whole | lengths),
            padding_per_query=({"mask": "padding"}, whole | per_query),
            causal=({"mask": "causal"}, whole),
            causal_offset=({"mask": "causal", "offset": 2}, whole),
            causal_offset_negative=({"mask": "causal", "offset": -2}, whole),
            sliding_window=({"mask": "sliding_window", "left": 2, "right": 1}, whole),
            no_self=({"mask": "no_self"}, whole),
            segments=({"mask": "segments"}, whole | segments),
            prefix_lm=({"mask": "prefix_lm"}, whole | lengths),
            causal_and_padding=({"mask": "causal & padding"}, whole | lengths),
            algebra=(algebra, whole),
            dense=({"mask": "dense"}, whole | {"dense": with_empty_row}),
        ),
    ]
