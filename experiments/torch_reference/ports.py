"""A module that jattn does not have: what the tests of `parity.diff` hold ports against."""

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jattn.parity.fixtures import Fixture
from jattn.parity.recording import record

T, N, H = 7, 2, 4
D = N * H


class Attention(nn.Module):
    """Multi-head attention with rotary positions, which turn the halves of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] and a mask [B, T], True for real tokens."""
        query, key, value = (
            projection(x).unflatten(-1, (N, H)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        scores = rotary(query) @ rotary(key).transpose(-1, -2) / math.sqrt(H)
        weights = F.softmax(scores.masked_fill(~mask[:, None, None], -math.inf), dim=-1)
        return self.out((weights @ value).transpose(1, 2).flatten(-2))


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Turn each half of a head [..., T, H] by its position."""
    frequencies = 100.0 ** (-torch.arange(0, H, 2, dtype=x.dtype) / H)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Block(nn.Module):
    """Attention and two Linears with a GELU between, each added and then normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T, D] → [B, T, D]."""
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Tagger(nn.Module):
    """An LSTM, two blocks, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, D, batch_first=True)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(D, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Features [B, T, 6] and a mask [B, T] → logits [B, T, 3]."""
        x, _ = self.lstm(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def tagger() -> Fixture:
    """The whole module, with its insides."""
    random = np.random.default_rng(0)
    module = Tagger().double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = random.normal(scale=0.5, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn + ("norm" in name and "weight" in name)))
    mask = np.arange(T) < np.array([[7], [4], [2]])
    inputs = {"x": random.normal(size=(3, T, 6)), "mask": mask}
    return record(module, inputs, system="ports/tagger", case="tagger")


def all_ports() -> Mapping[str, Callable[[], Fixture]]:
    """File → what records it."""
    return {"ports/tagger/whole.safetensors": functools.partial(tagger)}
