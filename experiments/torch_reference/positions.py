"""Positions: sinusoidal with their relative property, and learned."""

import math

import numpy as np
import torch
from torch import nn

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
    ]
