"""Attention pooling: averages, kernel regression, and one score after another."""

from typing import Any

import torch
from torch import nn

from experiments.torch_reference.cases import (
    LENGTHS,
    LENGTHS_PER_QUERY,
    QUERY_KEY_VALUE,
    B,
    Case,
    H,
    Inputs,
    S,
    T,
    V,
    cases_of,
)
from experiments.torch_reference.shared import Outputs, allowed_by_lengths, masked_softmax


class Pooling(nn.Module):
    """Softmax(score) · value, with dropout on the weights; subclasses define the score."""

    def __init__(self, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Query [B, T, H], key [B, S, H'] → scores [B, T, S]."""
        raise NotImplementedError

    def pool(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
    ) -> Outputs:
        """Output [B, T, V] and weights [B, T, S]."""
        weights = masked_softmax(self.score(query, key), allowed)
        return {"output": torch.bmm(self.dropout(weights), value), "weights": weights}

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> Outputs:
        """Pools with the keys past their length hidden."""
        allowed = None if lengths is None else allowed_by_lengths(lengths, key.shape[1])
        return self.pool(query, key, value, allowed)


class AveragePooling(Pooling):
    """Every query gets the mean of the values."""

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The same score for all."""
        return torch.zeros(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype)


class KernelRegression(Pooling):
    """f(x) = Σ softmax(−|x − xᵢ|²/2) yᵢ."""

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Minus half the squared distance."""
        return -((query[:, :, None, :] - key[:, None, :, :]) ** 2).sum(dim=-1) / 2


class ParametricKernelRegression(Pooling):
    """f(x) = Σ softmax(−|(x − xᵢ) w|²/2) yᵢ, with w learned; leave-one-out for training."""

    def __init__(self, leave_one_out: bool = False) -> None:
        super().__init__()
        self.leave_one_out = leave_one_out
        self.w = nn.Parameter(torch.empty(()))

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Minus half the squared distance, in units of 1/w."""
        return -(((query[:, :, None, :] - key[:, None, :, :]) * self.w) ** 2).sum(dim=-1) / 2

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> Outputs:
        """Pools; where `leave_one_out`, sample i does not see itself."""
        if not self.leave_one_out:
            return super().forward(query, key, value, lengths)
        itself = torch.eye(query.shape[1], key.shape[1], dtype=torch.bool)
        return self.pool(query, key, value, ~itself)


class AdditiveAttention(Pooling):
    """a(q, k) = w_vᵀ tanh(W_q q + W_k k), without biases."""

    def __init__(
        self,
        query_features: int,
        key_features: int,
        hidden_features: int,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__(dropout_rate)
        self.W_q = nn.Linear(query_features, hidden_features, bias=False)
        self.W_k = nn.Linear(key_features, hidden_features, bias=False)
        self.w_v = nn.Linear(hidden_features, 1, bias=False)

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Every query with every key by broadcasting."""
        features = torch.tanh(self.W_q(query)[:, :, None, :] + self.W_k(key)[:, None, :, :])
        return self.w_v(features).squeeze(-1)


class DotProductAttention(Pooling):
    """softmax(QKᵀ/√H) V, or unscaled."""

    def __init__(self, scaled: bool = True, dropout_rate: float = 0.0) -> None:
        super().__init__(dropout_rate)
        self.scaled = scaled

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Inner products, divided by √H where scaled."""
        return torch.bmm(query, key.transpose(1, 2)) / (
            query.shape[-1] ** 0.5 if self.scaled else 1.0
        )


class BilinearAttention(Pooling):
    """a(q, k) = qᵀ W k ("multiplicative", "general")."""

    def __init__(self, query_features: int, key_features: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(query_features, key_features))

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Query times W times key."""
        return torch.bmm(query @ self.W, key.transpose(1, 2))


class CosineAttention(Pooling):
    """a(q, k) = qᵀk / (|q| |k|)."""

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The cosine of the angle between them."""
        query = query / query.norm(dim=-1, keepdim=True)
        return torch.bmm(query, (key / key.norm(dim=-1, keepdim=True)).transpose(1, 2))


def scored_attention(score: str, **arguments: int) -> Pooling:
    """The pooling of a score by its name."""
    if score == "dot_product":
        return DotProductAttention(scaled=False)
    return {"bilinear": BilinearAttention, "cosine": CosineAttention}[score](**arguments)


def cases() -> list[Case]:
    """Every case of attention pooling."""
    return [*average_cases(), *score_cases()]


def average_cases() -> list[Case]:
    """Averages of the values, and kernel regression."""
    lengths: Inputs = {"lengths": LENGTHS}
    whole, line = QUERY_KEY_VALUE, {"query": (B, T, 1), "key": (B, S, 1), "value": (B, S, V)}
    samples = {"query": (B, T, H), "key": (B, T, H), "value": (B, T, V)}
    return [
        *cases_of(
            "pooling/average",
            AveragePooling,
            average=({}, whole),
            average_lengths=({}, whole | lengths),
        ),
        *cases_of(
            "pooling/kernel_regression",
            KernelRegression,
            kernel_regression=({}, line),
            kernel_regression_features=({}, whole | lengths),
        ),
        *cases_of(
            "pooling/parametric_kernel_regression",
            ParametricKernelRegression,
            parametric=({}, line),
            parametric_leave_one_out=({"leave_one_out": True}, samples),
        ),
    ]


def score_cases() -> list[Case]:
    """Every other score."""
    lengths: Inputs = {"lengths": LENGTHS}
    per_query: Inputs = {"lengths": LENGTHS_PER_QUERY}
    whole: Inputs = QUERY_KEY_VALUE
    widths: Inputs = {"query": (B, T, 13), "key": (B, S, 17), "value": (B, S, V)}
    sizes: dict[str, Any] = {"query_features": 13, "key_features": 17}
    additive = sizes | {"hidden_features": 19, "dropout_rate": 0.5}
    product, bilinear = {"score": "dot_product"}, {"score": "bilinear", **sizes}
    return [
        *cases_of(
            "pooling/additive",
            AdditiveAttention,
            additive=(additive, widths),
            additive_lengths=(additive, widths | lengths),
            additive_lengths_per_query=(additive, widths | per_query),
        ),
        *cases_of(
            "pooling/scaled_dot_product",
            DotProductAttention,
            scaled_dot_product=({"dropout_rate": 0.5}, whole),
            scaled_dot_product_lengths=({}, whole | lengths),
            scaled_dot_product_lengths_per_query=({}, whole | per_query),
        ),
        *cases_of(
            "pooling/scores",
            scored_attention,
            dot_product=(product, whole),
            dot_product_one_query=(product, whole | {"query": (B, 1, H)}),
            bilinear=(bilinear, widths),
            bilinear_lengths=(bilinear, widths | lengths),
            cosine=({"score": "cosine"}, whole | lengths),
        ),
    ]
