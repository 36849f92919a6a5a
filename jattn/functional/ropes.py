"""Frequencies of rotary positions, plain or stretched to contexts longer than those of training.

A rope is a frozen value. It gives the frequency of each pair of features and a factor of cosine and
sine; `positions.rotary` turns queries and keys by them. An array of frequencies does as well.

Frequencies are float32 numbers, because the weights in circulation were trained with those: at
position 100,000 the last bit of a frequency moves a cosine by 0.005. (PyTorch rounds some of its
powers differently, by that bit.)
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Geometrically spaced frequencies.

        ω_j = base^(−2j/R),  j = 0 … R/2 − 1

    Args:
      base: θ, near the ratio of the longest wavelength to the shortest.

    Raises:
      ValueError: base is not a number above 1.

    Paper: Su et al. 2021, https://arxiv.org/abs/2104.09864

    Example:
      >>> Rope().frequencies(4)
      array([1.  , 0.01], dtype=float32)
    """

    base: float = 10000.0

    depends_on_length: ClassVar[bool] = False
    """Whether the frequencies depend on the length of the sequence."""

    def __post_init__(self) -> None:
        _check_above(1, base=self.base)

    @property
    def scale(self) -> float:
        """The factor of cosine and sine, so that scores gain its square."""
        return 1.0

    def frequencies(self, features: int, length: Any = None) -> np.ndarray | Array:
        """The frequency of each pair, float32 `[R/2]`.

        Args:
          features: R, the number of features that are turned, even.
          length: of the sequence, an integer or integers `[...]`, where they depend on it; then the
            frequencies are `[..., R/2]`. None: short.

        Raises:
          ValueError: features is odd or not positive, or does not fit the rope.
        """
        return 1 / self._wavelengths(features)

    def _wavelengths(self, features: int) -> np.ndarray:
        """1 / ω_j, rounded once to float32."""
        return _power(np.float32(self.base), _exponents(features))


@dataclasses.dataclass(frozen=True)
class Linear(Rope):
    """All positions divided by a factor.

        ω_j ← ω_j / factor

    Args:
      base: θ.
      factor: how many times the context is longer.

    Paper: Chen et al. 2023, https://arxiv.org/abs/2306.15595

    Example:
      >>> Linear(factor=4.0).frequencies(4)
      array([0.25  , 0.0025], dtype=float32)
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_above(0, factor=self.factor)

    def frequencies(self, features: int, length: Any = None) -> np.ndarray | Array:
        """As `Rope.frequencies`."""
        return super().frequencies(features) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Dynamic(Rope):
    """A base that grows with the length L of the sequence, once it exceeds the M of training.

        base ← base · (factor · L / M − factor + 1)^(R / (R − 2))  where L > M

    Args:
      base: θ.
      factor: how many times the context is longer.
      max_length: M.

    Papers: "NTK-aware" scaling, described by Peng et al. 2023, https://arxiv.org/abs/2309.00071,
    appendix B

    Example:
      >>> np.asarray(Dynamic(factor=2.0, max_length=8).frequencies(4, length=16)).round(4)
      array([1.    , 0.0033], dtype=float32)
    """

    factor: float = 1.0
    max_length: int = 2048

    depends_on_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_above(0, factor=self.factor, max_length=self.max_length)

    def frequencies(self, features: int, length: Any = None) -> np.ndarray | Array:
        """As `Rope.frequencies`."""
        if features < 4:
            raise ValueError(f"Dynamic needs at least 4 features, got {features}")
        short, M = super().frequencies(features), np.float32(self.max_length)
        L, xp = _length(self.max_length if length is None else length)
        longer = np.float32(self.factor) * xp.maximum(L, M) / M - np.float32(self.factor - 1)
        base = (np.float32(self.base) * _power(longer, features / (features - 2)))[..., None]
        grown = 1 / _power(base, _aligned(_exponents(features), base))
        return xp.where((L > M)[..., None], grown, _aligned(short, grown))


@dataclasses.dataclass(frozen=True)
class Llama3(Rope):
    """Long wavelengths divided by a factor, short ones kept, and a blend of both between.

        λ = 2π / ω,  s = (L₀ / λ − low) / (high − low)
        ω ← ω                            where λ < L₀ / high
        ω ← ω / factor                   where λ > L₀ / low
        ω ← (1 − s) ω / factor + s ω     between

    Args:
      base: θ.
      factor: how many times the context is longer.
      low_frequency_factor, high_frequency_factor: where the blend begins and ends.
      original_length: L₀, the length of training.

    Raises:
      ValueError: a number is not positive, or low is not below high.

    Paper: Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783

    Example:
      >>> Llama3(500000.0).frequencies(128)[[0, 32, 63]]
      array([1.000000e+00, 5.248460e-04, 3.068926e-07], dtype=float32)
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.low_frequency_factor, self.high_frequency_factor
        _check_above(
            0, factor=self.factor, low_frequency_factor=low, original_length=self.original_length
        )
        _check_above(low, high_frequency_factor=high)

    def frequencies(self, features: int, length: Any = None) -> np.ndarray | Array:
        """As `Rope.frequencies`."""
        frequencies = np.asarray(super().frequencies(features))
        low, high, factor, L = (
            np.float32(number)
            for number in (
                self.low_frequency_factor, self.high_frequency_factor, self.factor,
                self.original_length,
            )
        )  # fmt: skip
        wavelengths = np.float32(2 * math.pi) / frequencies
        is_short = wavelengths < np.float32(self.original_length / self.high_frequency_factor)
        is_long = wavelengths > np.float32(self.original_length / self.low_frequency_factor)
        smooth = (L / wavelengths - low) / (high - low)
        blended = (1 - smooth) * frequencies / factor + smooth * frequencies
        stretched = np.where(is_long, frequencies / factor, blended)
        return np.where(is_short, frequencies, stretched)


@dataclasses.dataclass(frozen=True)
class Yarn(Rope):
    """Pairs that turn often within L₀ kept, those that turn seldom divided by a factor.

        d(r) = R ln(L₀ / 2πr) / (2 ln base)          the pair that turns r times within L₀
        ramp = clip((j − low) / (high − low), 0, 1),  low = ⌊d(fast)⌋, high = ⌈d(slow)⌉
        ω_j ← ramp_j ω_j / factor + (1 − ramp_j) ω_j

    Args:
      base: θ.
      factor: how many times the context is longer.
      original_length: L₀, the length of training.
      fast, slow: turns within L₀ from which on a pair is kept, and below which it is divided.
      truncate: whether `low` and `high` are rounded.
      attention_factor: the factor of cosine and sine; None: 0.1 ln(factor) + 1.

    Paper: Peng et al. 2023, https://arxiv.org/abs/2309.00071

    Example:
      >>> Yarn(factor=4.0, original_length=64).frequencies(8), round(Yarn(factor=4.0).scale, 3)
      (array([1.00e+00, 6.25e-02, 2.50e-03, 2.50e-04], dtype=float32), 1.139)
    """

    factor: float = 1.0
    original_length: int = 2048
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_above(
            0, factor=self.factor, original_length=self.original_length, fast=self.fast,
            slow=self.slow,
        )  # fmt: skip
        _check_above(self.slow, fast=self.fast)
        checks.assert_bool(truncate=self.truncate)

    @property
    def scale(self) -> float:
        """As `Rope.scale`."""
        given, factor = self.attention_factor, self.factor
        return (0.1 * math.log(factor) + 1 if factor > 1 else 1.0) if given is None else given

    def frequencies(self, features: int, length: Any = None) -> np.ndarray | Array:
        """As `Rope.frequencies`."""
        wavelengths = self._wavelengths(features)
        low, high = (self._pair(turns, features) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, features - 1)
        width = high - low or 0.001
        pairs = np.arange(features // 2, dtype=np.float32)
        kept = 1 - np.clip((pairs - np.float32(low)) / np.float32(width), 0, 1)
        divided = 1 / (np.float32(self.factor) * wavelengths)
        return divided * (1 - kept) + 1 / wavelengths * kept

    def _pair(self, turns: float, features: int) -> float:
        wavelength = self.original_length / (turns * 2 * math.pi)
        return features * math.log(wavelength) / (2 * math.log(self.base))


@dataclasses.dataclass(frozen=True)
class LongRope(Rope):
    """A factor for each pair, found by a search; one list for short sequences, one for long.

        ω_j ← ω_j / long_factors[j] where L > L₀, else ω_j / short_factors[j]

    Args:
      base: θ.
      short_factors, long_factors: a number for each pair.
      original_length: L₀, the length of training.
      factor: how many times the context is longer.
      attention_factor: the factor of cosine and sine; None: √(1 + ln(factor) / ln L₀).

    Raises:
      ValueError: a number is not positive, or the lists differ in length.

    Paper: Ding et al. 2024, https://arxiv.org/abs/2402.13753

    Example:
      >>> rope = LongRope(short_factors=(1.0, 1.0), long_factors=(1.0, 4.0), original_length=64)
      >>> rope.frequencies(4), rope.frequencies(4, length=65)
      (array([1.  , 0.01], dtype=float32), array([1.    , 0.0025], dtype=float32))
    """

    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    original_length: int = 4096
    factor: float = 1.0
    attention_factor: float | None = None

    depends_on_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("short_factors", "long_factors"):  # a list cannot be hashed
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
            _check_above(0, **{f"{name}[{n}]": each for n, each in enumerate(getattr(self, name))})
        _check_above(0, factor=self.factor)
        _check_above(1, original_length=self.original_length)
        if not self.short_factors or len(self.short_factors) != len(self.long_factors):
            got = f"{len(self.short_factors)} and {len(self.long_factors)}"
            raise ValueError(f"short_factors and long_factors must be of one length, got {got}")

    @property
    def scale(self) -> float:
        """As `Rope.scale`; short sequences have it too."""
        if self.attention_factor is not None:
            return self.attention_factor
        longer = math.log(self.factor) / math.log(self.original_length)
        return math.sqrt(1 + longer) if self.factor > 1 else 1.0

    def frequencies(self, features: int, length: Any = None) -> np.ndarray | Array:
        """As `Rope.frequencies`."""
        wavelengths = self._wavelengths(features)
        if len(wavelengths) != len(self.short_factors):
            got = f"{features} features"
            raise ValueError(f"LongRope has factors of {len(self.short_factors)} pairs, got {got}")
        short, long = (
            1 / (np.asarray(factors, np.float32) * wavelengths)
            for factors in (self.short_factors, self.long_factors)
        )
        L, xp = _length(0 if length is None else length)
        is_long = (L > np.float32(self.original_length))[..., None]
        return xp.where(is_long, _aligned(long, is_long), _aligned(short, is_long))


def _exponents(features: int) -> np.ndarray:
    """2j / R in float32."""
    if features < 2 or features % 2:
        raise ValueError(f"features must be even and positive, for they are pairs, got {features}")
    return np.arange(0, features, 2, dtype=np.float32) / np.float32(features)


def _power(base: Any, exponent: Any) -> Any:
    """base ^ exponent in the widest float at hand, so that it is rounded to float32 once."""
    if isinstance(base, jax.Array):
        wide = jnp.result_type(float)
        return (base.astype(wide) ** jnp.asarray(exponent, wide)).astype(jnp.float32)
    return (np.float64(base) ** np.float64(exponent)).astype(np.float32)


def _aligned(row: Any, array: Any) -> Any:
    """A row with as many axes as the array."""
    return row.reshape((1,) * (array.ndim - 1) + row.shape)


def _length(length: Any) -> tuple[Any, Any]:
    """A length as float32, and the library that computes with it."""
    concrete = checks.concrete(length)
    if concrete is None:
        return jnp.asarray(length).astype(jnp.float32), jnp
    return concrete.astype(np.float32), np


def _check_above(lowest: float, **numbers: Any) -> None:
    for name, number in numbers.items():
        is_number = isinstance(number, (int, float, np.number)) and not isinstance(number, bool)
        if not is_number or not lowest < number < math.inf:
            raise ValueError(f"{name} must be a number above {lowest}, got {number!r}")
