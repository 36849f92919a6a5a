"""Sequences pooled over time: by features, by several queries, by one learned query."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import Case, Inputs
from experiments.torch_reference.shared import Outputs, allowed_by_lengths, masked_softmax


def softmax_over_time(scores: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Scores [B, T, R] → weights [B, T, R] that sum to 1 over T; 0 past the lengths [B]."""
    allowed = None if lengths is None else allowed_by_lengths(lengths, scores.shape[1])
    return masked_softmax(scores.transpose(1, 2), allowed).transpose(1, 2)


class FeaturePooling(nn.Module):
    """α = softmax over time of tanh(W x + b), context = Σ_t α_t ⊙ x_t."""

    def __init__(self, features: int, use_bias: bool = True) -> None:
        super().__init__()
        self.W = nn.Linear(features, features, bias=use_bias)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """x [B, T, D] → context [B, D] and weights [B, T, D]."""
        weights = softmax_over_time(torch.tanh(self.W(x)), lengths)
        return {"context": (weights * x).sum(dim=1), "weights": weights}


class MultiHopPooling(nn.Module):
    """A = softmax over time of W x + b, context = Aᵀ x.

    The popular code runs its LSTM time-first and then softmaxes over what is the batch, so that
    sentences attend to each other: a mistake, not a variant.
    """

    def __init__(self, features: int, num_hops: int, use_bias: bool = True) -> None:
        super().__init__()
        self.W = nn.Linear(features, num_hops, bias=use_bias)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """x [B, T, D] → context [B, R, D] and weights [B, R, T]."""
        weights = softmax_over_time(self.W(x), lengths).transpose(1, 2)
        return {"context": torch.bmm(weights, x), "weights": weights}


class LearnedQueryPooling(nn.Module):
    """u = tanh(W h + b), α = softmax(uᵀ u_w), c = Σ α h."""

    def __init__(self, features: int, hidden_features: int, use_bias: bool = True) -> None:
        super().__init__()
        self.W = nn.Linear(features, hidden_features, bias=use_bias)
        self.u_w = nn.Parameter(torch.empty(hidden_features))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """x [B, T, D] → context [B, D] and weights [B, T]."""
        weights = softmax_over_time(torch.tanh(self.W(x)) @ self.u_w[:, None], lengths)
        return {"context": (weights * x).sum(dim=1), "weights": weights.squeeze(-1)}


def cases() -> list[Case]:
    """Every case of pooling over time."""
    x: Inputs = {"x": (3, 7, 5)}
    lengths: Inputs = x | {"lengths": np.array([4, 7, 0])}
    systems: list[tuple[str, Callable[..., nn.Module], dict[str, Any]]] = [
        ("feature", FeaturePooling, {"features": 5}),
        ("multi_hop", MultiHopPooling, {"features": 5, "num_hops": 2}),
        ("learned_query", LearnedQueryPooling, {"features": 5, "hidden_features": 11}),
    ]
    return [
        Case(f"sequence_pooling/{name}", f"{name}{suffix}", reference, arguments | more, inputs)
        for name, reference, arguments in systems
        for suffix, more, inputs in (
            ("", {}, x),
            ("_lengths", {}, lengths),
            ("_no_bias", {"use_bias": False}, lengths),
        )
    ]
