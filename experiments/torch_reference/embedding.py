"""The table of vectors, with PyTorch's padding, norms and counted gradients."""

from typing import Any

import torch
from torch import nn

from experiments.torch_reference.cases import Case, Inputs, cases_of, ids
from experiments.torch_reference.shared import Outputs


class Embedding(nn.Module):
    """PyTorch's Embedding.

    It looks up in a copy, so that what `max_norm` rewrites can be seen beside it.
    """

    def __init__(self, num_embeddings: int, features: int, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, features, **options)

    def forward(self, tokens: torch.Tensor) -> Outputs:
        """Token ids [B, T] → rows [B, T, D], and the table as PyTorch has rewritten it."""
        own, table = self.embedding, self.embedding.weight.clone()
        rows = nn.functional.embedding(
            tokens, table, own.padding_idx, own.max_norm, own.norm_type, own.scale_grad_by_freq
        )
        return {"output": rows, "table": table.detach()}


def cases() -> list[Case]:
    """Every case of the embedding."""
    tokens: Inputs = {"tokens": ids([3, 1, 12, 4, 3, 2], [7, 7, 2, 9, 7, 5], [1, 0, 2, 2, 2, 11])}
    table: dict[str, Any] = {"num_embeddings": 13, "features": 5}
    return cases_of(
        "embedding/table",
        Embedding,
        plain=(table, tokens),
        padding=(table | {"padding_idx": 2}, tokens),
        padding_counted=(table | {"padding_idx": -6, "scale_grad_by_freq": True}, tokens),
        max_norm=(table | {"padding_idx": 0, "max_norm": 1.0}, tokens),
        max_norm_1=(table | {"max_norm": 2.0, "norm_type": 1.0}, tokens),
    )
