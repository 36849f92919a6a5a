"""Rows 1 to 8: attention pooling, its scores and its masks."""

import torch
from torch import nn

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


class Pooling(nn.Module):
    """softmax(score) · value, with dropout on the weights; subclasses define the score."""

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
    """Row 1: every query gets the mean of the values."""

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The same score for all."""
        return torch.zeros(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype)


class KernelRegression(Pooling):
    """Row 2: f(x) = Σ softmax(−|x − xᵢ|²/2) yᵢ."""

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Minus half the squared distance."""
        return -((query[:, :, None, :] - key[:, None, :, :]) ** 2).sum(dim=-1) / 2


class ParametricKernelRegression(Pooling):
    """Row 3: f(x) = Σ softmax(−|(x − xᵢ) w|²/2) yᵢ, with w learned; leave-one-out for training."""

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


class MaskedSoftmax(nn.Module):
    """Row 4: softmax that gives hidden positions exactly 0."""

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


class AdditiveAttention(Pooling):
    """Row 5: a(q, k) = w_vᵀ tanh(W_q q + W_k k), without biases."""

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
    """Row 6, and row 7 unscaled: softmax(QKᵀ/√H) V."""

    def __init__(self, scaled: bool = True, dropout_rate: float = 0.0) -> None:
        super().__init__(dropout_rate)
        self.scaled = scaled

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Inner products, divided by √H where scaled."""
        return torch.bmm(query, key.transpose(1, 2)) / (
            query.shape[-1] ** 0.5 if self.scaled else 1.0
        )


class BilinearAttention(Pooling):
    """Row 7: a(q, k) = qᵀ W k ("multiplicative", "general")."""

    def __init__(self, query_features: int, key_features: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(query_features, key_features))

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Query times W times key."""
        return torch.bmm(query @ self.W, key.transpose(1, 2))


class CosineAttention(Pooling):
    """Row 7: a(q, k) = qᵀk / (|q| |k|)."""

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The cosine of the angle between them."""
        query = query / query.norm(dim=-1, keepdim=True)
        return torch.bmm(query, (key / key.norm(dim=-1, keepdim=True)).transpose(1, 2))


def scored_attention(score: str, **arguments: int) -> Pooling:
    """Row 7: one of its three scores by name."""
    if score == "dot_product":
        return DotProductAttention(scaled=False)
    return {"bilinear": BilinearAttention, "cosine": CosineAttention}[score](**arguments)


class MaskedAttention(DotProductAttention):
    """Row 8: scaled dot-product attention under a mask; each kind is a comparison of indices."""

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
