"""Rotary positions: frequencies of every kind, and complex numbers turned by them.

Frequencies are float32 numbers: base^(2j/R) is rounded to float32 once, and what follows is
computed in float32. The angle is the float32 product of position and frequency; its cosine and sine
are taken in float64.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

Rope = dict[str, Any]
Frequencies = tuple[torch.Tensor, float]


def wavelengths(base: float | torch.Tensor, features: int) -> torch.Tensor:
    """base^(2j/R), one for each pair; the power in float64, rounded once."""
    exponents = torch.arange(0, features, 2).float() / features
    return torch.pow(torch.as_tensor(base).float().double(), exponents.double()).float()


def plain(features: int, length: int, base: float = 10000.0) -> Frequencies:
    """1 / base^(2j/R)."""
    return 1 / wavelengths(base, features), 1.0


def linear(features: int, length: int, factor: float, base: float = 10000.0) -> Frequencies:
    """All divided by the factor."""
    return 1 / wavelengths(base, features) / factor, 1.0


def dynamic(
    features: int, length: int, factor: float, max_length: int, base: float = 10000.0
) -> Frequencies:
    """base · (factor · L / M − (factor − 1))^(R / (R − 2)) once L > M."""
    grown: float | torch.Tensor = base
    if length > max_length:
        longer = factor * torch.tensor(float(length)) / max_length - (factor - 1)
        grown = base * torch.pow(longer.double(), features / (features - 2)).float()
    return 1 / wavelengths(grown, features), 1.0


def llama3(
    features: int,
    length: int,
    factor: float,
    low_frequency_factor: float,
    high_frequency_factor: float,
    original_length: int,
    base: float = 10000.0,
) -> Frequencies:
    """Pair by pair: kept, divided, or between the two by how often it turns in L₀."""
    low, high = low_frequency_factor, high_frequency_factor
    turned = []
    for frequency in 1 / wavelengths(base, features):
        wavelength = torch.tensor(2 * math.pi) / frequency
        if wavelength < original_length / high:
            turned.append(frequency)
        elif wavelength > original_length / low:
            turned.append(frequency / factor)
        else:
            smooth = (torch.tensor(float(original_length)) / wavelength - low) / (high - low)
            turned.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.stack(turned), 1.0


def yarn(
    features: int,
    length: int,
    factor: float,
    original_length: int,
    fast: float = 32.0,
    slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    base: float = 10000.0,
) -> Frequencies:
    """Divided where the ramp is 1, kept where it is 0; it rises from the fast pair to the slow."""

    def pair(turns: float) -> float:
        turning = math.log(original_length / (turns * 2 * math.pi))
        return features * turning / (2 * math.log(base))

    low, high = pair(fast), pair(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, features - 1)
    kept = 1 - ((torch.arange(features // 2).float() - low) / (high - low)).clamp(0, 1)
    wavelength = wavelengths(base, features)
    frequencies = 1 / (factor * wavelength) * (1 - kept) + 1 / wavelength * kept
    scale = 0.1 * math.log(factor) + 1 if attention_factor is None else attention_factor
    return frequencies, scale


def longrope(
    features: int,
    length: int,
    factor: float,
    short_factors: list[float],
    long_factors: list[float],
    original_length: int,
    base: float = 10000.0,
) -> Frequencies:
    """A factor of its own for each pair; the long ones once L > L₀."""
    factors = torch.tensor(long_factors if length > original_length else short_factors)
    scale = math.sqrt(1 + math.log(factor) / math.log(original_length))
    return 1 / (factors * wavelengths(base, features)), scale


KINDS: dict[str, Callable[..., Frequencies]] = {
    "Rope": plain,
    "Linear": linear,
    "Dynamic": dynamic,
    "Llama3": llama3,
    "Yarn": yarn,
    "LongRope": longrope,
}


def waves(positions: torch.Tensor, rope: Rope, features: int) -> torch.Tensor:
    """c·exp(i·position·ω_j) for positions [..., T]: complex [..., T, R/2].

    Each example has its own length, the greatest of its positions + 1.
    """
    if positions.dim() > 1:
        return torch.stack([waves(each, rope, features) for each in positions])
    numbers = {name: number for name, number in rope.items() if name != "kind"}
    length = int(positions.max()) + 1
    frequencies, scale = KINDS[rope["kind"]](features, length, **numbers)
    angles = (positions.float()[:, None] * frequencies).double()
    return torch.polar(torch.full_like(angles, scale), angles)


def turn(x: torch.Tensor, wave: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The first R features of x [..., T, N, H] as R/2 complex numbers, times waves [..., T, R/2].

    A number is the features j and R/2 + j, or, interleaved, 2j and 2j + 1.
    """
    features = 2 * wave.shape[-1]
    turned, rest = x[..., :features], x[..., features:]
    sizes, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    real, imaginary = turned.unflatten(-1, sizes).unbind(pair)
    cosine, sine = wave.real[..., None, :].to(x.dtype), wave.imag[..., None, :].to(x.dtype)
    pairs = real * cosine - imaginary * sine, real * sine + imaginary * cosine
    return torch.cat([torch.stack(pairs, dim=pair).flatten(start_dim=-2), rest], dim=-1)
