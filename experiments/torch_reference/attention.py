"""Attention with a sink for each head."""

import torch
from torch import nn

from experiments.torch_reference.cases import B, Case, Inputs, S, T, cases_of
from experiments.torch_reference.shared import Outputs


class SinkAttention(nn.Module):
    """The sink is one more column of scores, unscaled; it is dropped after the softmax."""

    def __init__(self, num_heads: int, learned: bool = True, offset: int | None = None) -> None:
        super().__init__()
        self.offset = offset
        sinks = torch.zeros(num_heads)  # softmax-off-by-one: exp(0) = 1 more in the denominator
        self.sinks = nn.Parameter(sinks) if learned else sinks

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Outputs:
        """Heads [B, T, N, H] → output [B, T, N, V] and weights [B, N, T, S].

        With an offset, query i sees the keys j ≤ i + offset.
        """
        scores = torch.einsum("btnh, bsnh -> bnts", query, key) / query.shape[-1] ** 0.5
        if self.offset is not None:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(self.offset)
            scores = scores.masked_fill(~seen, float("-inf"))
        column = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
        return {"output": torch.einsum("bnts, bsnv -> btnv", weights, value), "weights": weights}


def cases() -> list[Case]:
    """Every case of attention with a sink."""
    heads: Inputs = {"query": (B, T, 3, 2), "key": (B, S, 3, 2), "value": (B, S, 3, 5)}
    learned = {"num_heads": 3}
    fixed = learned | {"learned": False}
    return cases_of(
        "attention/sink",
        SinkAttention,
        sink=(learned, heads),
        sink_causal=(learned | {"offset": 0}, heads),
        sink_nothing_to_see=(learned | {"offset": -2}, heads),
        sink_off_by_one=(fixed, heads),
        sink_off_by_one_nothing_to_see=(fixed | {"offset": -2}, heads),
    )
