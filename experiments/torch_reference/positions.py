"""Positions: sinusoidal with their relative property, learned, and rotary."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference import ropes
from experiments.torch_reference.cases import B, Case, Inputs, T, cases_of
from experiments.torch_reference.shared import Outputs


def sinusoidal_encoding(positions: torch.Tensor, features: int) -> torch.Tensor:
    """P[i, 2j] = sin(i / 10000^(2j/D)), P[i, 2j+1] = cos(i / 10000^(2j/D)), in float64."""
    encoding = torch.zeros(len(positions), features, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        for column in range(0, features, 2):
            angle = position / 10000 ** (column / features)
            encoding[row, column], encoding[row, column + 1] = math.sin(angle), math.cos(angle)
    return encoding


class SinusoidalPositions(nn.Module):
    """x + P, then dropout."""

    def __init__(self, features: int, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.features = features
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: torch.Tensor) -> Outputs:
        """x [B, T, D] with its positions added."""
        encoding = sinusoidal_encoding(torch.arange(x.shape[1]), self.features)
        return {"output": self.dropout(x + encoding.to(x.dtype))}


class RelativeRotation(nn.Module):
    """P[i + δ] = R(δ) P[i], where R(δ) turns each pair (sin, cos) by δ / 10000^(2j/D)."""

    def __init__(self, features: int, offset: int) -> None:
        super().__init__()
        self.features, self.offset = features, offset

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> Outputs:
        """R(δ), R(δ) x for any x [..., D], and P at the positions i and i + δ."""
        rotation = torch.zeros(self.features, self.features, dtype=torch.float64)
        for column in range(0, self.features, 2):
            angle = self.offset / 10000 ** (column / self.features)
            sine, cosine = math.sin(angle), math.cos(angle)
            block = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
            rotation[column : column + 2, column : column + 2] = block
        return {
            "rotation": rotation.to(x.dtype),
            "rotated": x @ rotation.to(x.dtype).T,
            "encoding": sinusoidal_encoding(positions, self.features).to(x.dtype),
            "shifted": sinusoidal_encoding(positions + self.offset, self.features).to(x.dtype),
        }


class LearnedPositions(nn.Module):
    """x plus the first T rows of a learned table [max_length, D]."""

    def __init__(self, max_length: int, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_length, features)

    def forward(self, x: torch.Tensor) -> Outputs:
        """x [B, T, D] with its positions added."""
        return {"output": x + self.table(torch.arange(x.shape[1]))}


class Rotary(nn.Module):
    """Heads turned by their positions, or a share of the pairs by each of two axes."""

    def __init__(
        self, rope: ropes.Rope, features: int | None = None, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.rope, self.features, self.interleaved = rope, features, interleaved

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> Outputs:
        """x [B, T, N, H] turned; positions [T] or [B, T], or rows and columns instead."""
        features = self.features or x.shape[-1]
        if rows is None or columns is None:
            places = [torch.arange(x.shape[1]) if positions is None else positions]
        else:
            places = [rows, columns]
        of_axis = features // len(places)
        waves = torch.cat([ropes.waves(each, self.rope, of_axis) for each in places], dim=-1)
        return {"output": ropes.turn(x, waves, self.interleaved)}


def cases() -> list[Case]:
    """Every case of positions."""
    x: Inputs = {"x": (B, T, 14)}
    where: Inputs = x | {"positions": np.array([0, 1, 5, 100, 4095])}
    return [
        *cases_of(
            "positions/sinusoidal",
            SinusoidalPositions,
            sinusoidal=({"features": 14, "dropout_rate": 0.5}, x),
            sinusoidal_long=({"features": 6}, {"x": (1, 257, 6)}),
        ),
        *cases_of(
            "positions/rotation",
            RelativeRotation,
            rotation=({"features": 14, "offset": 3}, where),
            rotation_back=({"features": 14, "offset": -101}, where),
        ),
        *cases_of(
            "positions/learned",
            LearnedPositions,
            learned=({"max_length": T, "features": 13}, {"x": (B, T, 13)}),
            learned_shorter=({"max_length": 11, "features": 13}, {"x": (B, T, 13)}),
        ),
        *rotary_cases(),
    ]


ROPES: dict[str, ropes.Rope] = {
    "default": {"kind": "Rope", "base": 10000.0},
    "linear": {"kind": "Linear", "factor": 3.0},
    "dynamic": {"kind": "Dynamic", "factor": 2.5, "max_length": 11},
    "llama3": {
        "kind": "Llama3",
        "base": 500000.0,
        "factor": 7.0,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_length": 512,
    },
    "yarn": {"kind": "Yarn", "factor": 5.0, "original_length": 4096},
    "longrope": {
        "kind": "LongRope",
        "factor": 3.0,
        "short_factors": [1.0, 1.1, 1.0, 1.3, 1.7, 1.2, 2.0],
        "long_factors": [1.0, 1.3, 2.9, 4.1, 7.7, 11.3, 23.0],
        "original_length": 64,
    },
}
"""One of each kind; the factors of LongRope are of 14 features."""


def rotary_cases() -> list[Case]:
    """Every kind of rope, and every way to turn by it."""
    x: Inputs = {"x": (B, T, 3, 14)}
    near, far = np.array([0, 2, 17, 40, 63]), np.array([0, 5, 100, 4095, 12289])
    each = np.array([[0, 1, 2, 9, 10], [3, 0, 1, 40, 11]])
    very_far = np.array([0, 99_991, 100_000, 131_071, 1_000_003])
    plane: Inputs = {
        "x": (B, 6, 5, 12),
        "rows": np.array([0, 0, 0, 1, 1, 1]),
        "columns": np.array([0, 1, 2, 0, 1, 2]),
    }
    default: dict[str, Any] = {"rope": ROPES["default"]}
    exact = {"rope": ROPES["yarn"] | {"truncate": False, "attention_factor": 1.3}}
    neighbours = default | {"interleaved": True}
    return cases_of(
        "positions/rotary",
        Rotary,
        rotary=(default, x),
        rotary_interleaved=(neighbours, x),
        rotary_partial=(default | {"features": 6}, x),
        rotary_partial_interleaved=(neighbours | {"features": 6}, x),
        rotary_axes=(default, plane),
        rotary_axes_interleaved=(neighbours | {"features": 8}, plane),
        rotary_far=(default, x | {"positions": very_far}),
        rotary_linear=({"rope": ROPES["linear"]}, x | {"positions": far}),
        rotary_dynamic=({"rope": ROPES["dynamic"]}, x | {"positions": far}),
        rotary_dynamic_each=({"rope": ROPES["dynamic"]}, x | {"positions": each}),
        rotary_llama3=({"rope": ROPES["llama3"]}, x | {"positions": far}),
        rotary_yarn=({"rope": ROPES["yarn"]}, x | {"positions": far}),
        rotary_yarn_exact=(exact, x | {"positions": far}),
        rotary_longrope_short=({"rope": ROPES["longrope"]}, x | {"positions": near}),
        rotary_longrope_long=({"rope": ROPES["longrope"]}, x | {"positions": near + 1}),
    )
