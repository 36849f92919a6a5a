"""Position codes: sinusoidal and rotary."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional import checks, dtypes

Array = jax.Array


def sinusoidal_encoding(positions: int | Array, features: int, *, base: float = 10000.0) -> Array:
    """Sines and cosines of geometrically spaced wavelengths.

        P[i, 2j] = sin(i / base^(2j/D)),  P[i, 2j+1] = cos(i / base^(2j/D))

    Angles of known positions are computed in float64 before rounding, so that far positions keep
    their digits.

    Args:
      positions: a length T, for positions 0 … T − 1, which may be a symbol of `jax.export`; or
        positions `[..., T]`, integer or floating point.
      features: D, even.
      base: the ratio between the longest and the shortest wavelength.

    Returns:
      `[..., T, D]`, float32, or float64 where JAX's default is float64.

    Raises:
      ValueError: features is odd or not positive, or the length is negative.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> np.asarray(sinusoidal_encoding(2, 4)).round(2)
      array([[0.  , 1.  , 0.  , 1.  ],
             [0.84, 0.54, 0.01, 1.  ]], dtype=float32)
    """
    angles = _angles(_as_positions(positions), features, base)
    return rearrange(jnp.stack(_sin_cos(angles, _default_float())), "two ... J -> ... (J two)")


def sinusoidal_rotation(offset: float | Array, features: int, *, base: float = 10000.0) -> Array:
    """The rotation that shifts a sinusoidal encoding; it depends on the offset alone.

        P[i + δ] = R(δ) P[i],  ω_j = base^(−2j/D)
        R(δ) = blocks [[cos ω_j δ, sin ω_j δ], [−sin ω_j δ, cos ω_j δ]]

    Args:
      offset: δ, a scalar.
      features: D, even.
      base: as in `sinusoidal_encoding`.

    Returns:
      R(δ), `[D, D]`, orthogonal, float32, or float64 where JAX's default is float64.

    Raises:
      ValueError: features is odd or not positive.

    Paper: Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762

    Example:
      >>> P = sinusoidal_encoding(8, 6)
      >>> bool(jnp.allclose(P[3:], P[:-3] @ sinusoidal_rotation(3, 6).T, atol=1e-6))
      True
    """
    if np.ndim(offset) > 0:
        raise ValueError(f"offset must be a scalar, got shape {np.shape(offset)}")
    concrete = checks.concrete(offset)
    sin, cos = _sin_cos(
        _angles(jnp.asarray(offset) if concrete is None else concrete, features, base),
        _default_float(),
    )
    even = 2 * np.arange(features // 2)
    rotation = jnp.zeros((features, features), sin.dtype)
    rotation = rotation.at[even, even].set(cos).at[even + 1, even + 1].set(cos)
    return rotation.at[even, even + 1].set(sin).at[even + 1, even].set(-sin)


def rotary(
    x: Array, positions: Array | None = None, *, base: float = 10000.0, interleaved: bool = True
) -> Array:
    """Rotate pairs of features by an angle proportional to the position.

        (x_a, x_b) ← (x_a cos iω_j − x_b sin iω_j, x_a sin iω_j + x_b cos iω_j),  ω_j = base^(−2j/H)

    Then qᵀk depends on the offset alone.

    Args:
      x: `[..., T, N, H]`, floating point, H even: queries or keys.
      positions: `[T]` or `[..., T]`; None: 0 … T − 1.
      base: as in `sinusoidal_encoding`.
      interleaved: pairs are neighbours (2j, 2j + 1), as in the paper; otherwise halves
        (j, j + H/2), as in Llama.

    Returns:
      The shape and dtype of `x`; angles and products are computed in at least float32.

    Raises:
      ValueError: H is odd, or the positions do not fit.

    Paper: Su et al. 2021, https://arxiv.org/abs/2104.09864

    Example:
      >>> np.asarray(rotary(jnp.ones((2, 1, 2)))[1, 0]).round(2)
      array([-0.3 ,  1.38], dtype=float32)
    """
    x = jnp.asarray(x)
    sizes = checks.assert_shapes(x=(x, "... T N H"))
    checks.assert_floating(x=x)
    batch, T = sizes["..."], sizes["T"]
    if positions is not None and np.shape(positions) not in {(T,), (*batch, T)}:
        raise ValueError(
            f"positions must be [T] or [..., T] for x of shape {x.shape}, got {np.shape(positions)}"
        )
    sequence = _as_positions(T if positions is None else positions)
    angles = _angles(sequence, sizes["H"], base)[..., None, :]  # [..., T, 1, H/2]
    angles = angles[(None,) * (x.ndim - angles.ndim)]
    dtype = dtypes.accumulator(x.dtype)
    sin, cos = _sin_cos(angles, dtype)
    pairs = "... (J two) -> two ... J" if interleaved else "... (two J) -> two ... J"
    a, b = rearrange(x.astype(dtype), pairs, two=2)
    rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos])
    back = "two ... J -> ... (J two)" if interleaved else "two ... J -> ... (two J)"
    return rearrange(rotated, back).astype(x.dtype)


def _as_positions(positions: int | Array) -> np.ndarray | Array:
    if isinstance(positions, (int, np.integer)):
        if positions < 0:
            raise ValueError(f"a length must not be negative, got {positions}")
        return np.arange(positions)
    symbol: Any = positions
    if jax.export.is_symbolic_dim(symbol):
        return jnp.arange(symbol)
    concrete = checks.concrete(positions)
    return jnp.asarray(positions) if concrete is None else concrete


def _angles(positions: np.ndarray | Array, features: int, base: float) -> np.ndarray | Array:
    """The angles i · base^(−2j/D), `[..., D/2]`.

    They are NumPy float64 for known positions, else JAX's default float.
    """
    if features < 2 or features % 2:
        raise ValueError(
            f"features come in pairs of sine and cosine: their number must be even, got {features}"
        )
    frequencies = base ** (-np.arange(0, features, 2) / features)
    if isinstance(positions, np.ndarray):
        return positions.astype(np.float64)[..., None] * frequencies
    aligned = frequencies.reshape(*(1,) * positions.ndim, -1)
    return positions.astype(_default_float())[..., None] * jnp.asarray(aligned, _default_float())


def _sin_cos(angles: np.ndarray | Array, dtype: np.dtype) -> tuple[Array, Array]:
    xp = np if isinstance(angles, np.ndarray) else jnp
    return jnp.asarray(xp.sin(angles), dtype), jnp.asarray(xp.cos(angles), dtype)


def _default_float() -> np.dtype:
    return jnp.zeros(()).dtype
