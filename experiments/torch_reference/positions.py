"""Rows 19 to 21: sinusoidal and learned positions."""

import math

import torch
from torch import nn

from experiments.torch_reference.pooling import Outputs


def sinusoidal_encoding(positions: torch.Tensor, features: int) -> torch.Tensor:
    """P[i, 2j] = sin(i / 10000^(2j/D)), P[i, 2j+1] = cos(i / 10000^(2j/D)), in float64."""
    encoding = torch.zeros(len(positions), features, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        for column in range(0, features, 2):
            angle = position / 10000 ** (column / features)
            encoding[row, column], encoding[row, column + 1] = math.sin(angle), math.cos(angle)
    return encoding


class SinusoidalPositions(nn.Module):
    """Row 19: x + P, then dropout."""

    def __init__(self, features: int, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.features = features
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: torch.Tensor) -> Outputs:
        """x [B, T, D] with its positions added."""
        encoding = sinusoidal_encoding(torch.arange(x.shape[1]), self.features)
        return {"output": self.dropout(x + encoding.to(x.dtype))}


class RelativeRotation(nn.Module):
    """Row 20: P[i + δ] = R(δ) P[i], where R(δ) turns each pair (sin, cos) by δ / 10000^(2j/D)."""

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
    """Row 21: x plus the first T rows of a learned table [max_length, D]."""

    def __init__(self, max_length: int, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_length, features)

    def forward(self, x: torch.Tensor) -> Outputs:
        """x [B, T, D] with its positions added."""
        return {"output": x + self.table(torch.arange(x.shape[1]))}
