"""What positions add to the scores: ALiBi, T5's biases, and BERT's relative keys."""

import math

import torch
from torch import nn

from experiments.torch_reference.cases import B, Case, Inputs, cases_of
from experiments.torch_reference.shared import Outputs, masked_softmax


class BiasedAttention(nn.Module):
    """softmax(q·k / √H + bias) v, over heads [B, T, N, H], causal or not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> Outputs:
        """Output [B, T, N, V] and weights [B, N, T, S] under a bias [N, T, S]."""
        scores = torch.einsum("btnh, bsnh -> bnts", query, key) / query.shape[-1] ** 0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
        weights = masked_softmax(scores + bias, seen.tril() if self.causal else None)
        return {"output": torch.einsum("bnts, bsnv -> btnv", weights, value), "weights": weights}


def alibi_slopes(num_heads: int) -> list[float]:
    """Of the code that the paper published: 2^(−8 h / N), else those of two powers of two."""
    if math.log2(num_heads).is_integer():
        first = 2 ** (-(2 ** -(math.log2(num_heads) - 3)))
        return [first ** (head + 1) for head in range(num_heads)]
    below = 2 ** math.floor(math.log2(num_heads))
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: num_heads - below]


class Alibi(BiasedAttention):
    """The bias −slope·|i − j|; the slopes of the paper are float32 numbers."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slopes: torch.Tensor | None = None,
    ) -> Outputs:
        """Output and weights; without slopes [N], those of the paper."""
        (T, N), S = query.shape[1:3], key.shape[1]
        if slopes is None:
            slopes = torch.tensor(alibi_slopes(N), dtype=torch.float32)
        distance = (torch.arange(T)[:, None] - torch.arange(S)).abs()
        return self.attend(query, key, value, -slopes.to(query.dtype)[:, None, None] * distance)


def t5_bucket(offset: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The bucket of the offset j − i.

    Half of the buckets are for later keys, or these share that of distance 0. Half of the others
    hold one distance each. Bucket n + m, of those beyond, begins at n (max / n)^(m / (b − n)); as
    integers: max^m · n^(b − n − m) ≤ distance^(b − n).
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if offset > 0 else 0
    distance = abs(offset) if bidirectional else max(-offset, 0)
    near = num_buckets // 2
    if distance < near:
        return first + distance
    far = num_buckets - near
    begun = [max_distance**m * near ** (far - m) <= distance**far for m in range(1, far)]
    return first + near + sum(begun)


class T5Bias(BiasedAttention):
    """A number of the table for each bucket of offsets and each head."""

    def __init__(self, causal: bool, bidirectional: bool, max_distance: int) -> None:
        super().__init__(causal)
        self.bidirectional, self.max_distance = bidirectional, max_distance

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor
    ) -> Outputs:
        """Output and weights; table [buckets, N]."""
        sizes = len(table), self.max_distance, self.bidirectional
        rows, columns = range(query.shape[1]), range(key.shape[1])
        buckets = torch.tensor([[t5_bucket(j - i, *sizes) for j in columns] for i in rows])
        return self.attend(query, key, value, table[buckets].permute(2, 0, 1))


def relative_scores(
    query: torch.Tensor, key: torch.Tensor, table: torch.Tensor, with_key: bool
) -> torch.Tensor:
    """(q·k + q·e) / √H, or (q·k + (q + k)·e) / √H, with e = E[i − j + L − 1]: [B, N, T, S]."""
    i, j = torch.arange(query.shape[1])[:, None], torch.arange(key.shape[1])
    rows = table[i - j + (len(table) - 1) // 2]
    scores = torch.einsum("btnh, bsnh -> bnts", query, key)
    scores = scores + torch.einsum("btnh, tsh -> bnts", query, rows)
    if with_key:
        scores = scores + torch.einsum("bsnh, tsh -> bnts", key, rows)
    return scores / query.shape[-1] ** 0.5


class RelativePositions(nn.Module):
    """Attention with a learned row for each distance, over heads [B, T, N, H], causal or not."""

    def __init__(
        self, max_length: int, head_features: int, with_key: bool = False, causal: bool = False
    ) -> None:
        super().__init__()
        self.distance_embedding = nn.Embedding(2 * max_length - 1, head_features)
        self.with_key, self.causal = with_key, causal

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Outputs:
        """Output [B, T, N, V] and weights [B, N, T, S]."""
        scores = relative_scores(query, key, self.distance_embedding.weight, self.with_key)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if self.causal else None
        weights = masked_softmax(scores, seen)
        return {"output": torch.einsum("bnts, bsnh -> btnh", weights, value), "weights": weights}


def cases() -> list[Case]:
    """Every case of the modifiers."""

    def heads(num_heads: int, queries: int, keys: int) -> Inputs:
        query, key = (B, queries, num_heads, 2), (B, keys, num_heads, 2)
        return {"query": query, "key": key, "value": (B, keys, num_heads, 3)}

    far: Inputs = heads(3, 19, 23)
    causal, both = {"causal": True}, {"causal": False}
    t5 = {"bidirectional": True, "max_distance": 17}
    relative = {"max_length": 11, "head_features": 2}
    return [
        *cases_of(
            "modifiers/alibi",
            Alibi,
            alibi=(causal, heads(3, 7, 7)),
            alibi_both_ways=(both, heads(4, 5, 7)),
            alibi_twelve_heads=(causal, heads(12, 5, 5)),
            alibi_learned=(causal, heads(5, 7, 7) | {"slopes": (5,)}),
        ),
        *cases_of(
            "modifiers/t5_bias",
            T5Bias,
            t5_bias=(both | t5, far | {"table": (10, 3)}),
            t5_bias_causal=(causal | t5 | {"bidirectional": False}, far | {"table": (7, 3)}),
        ),
        *cases_of(
            "modifiers/relative_key",
            RelativePositions,
            relative_key=(relative, heads(3, 5, 7)),
            relative_key_causal=(relative | causal, heads(3, 11, 11)),
            relative_key_query=(relative | {"with_key": True}, heads(3, 5, 7)),
        ),
    ]
