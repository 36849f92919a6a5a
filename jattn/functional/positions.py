"""Position codes: sinusoidal and rotary."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional import checks, dtypes
from jattn.functional.ropes import Rope

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
    x: Array,
    positions: Array | tuple[Array, ...] | None = None,
    *,
    rope: Any = Rope(),  # noqa: B008
    features: int | None = None,
    length: Any = None,
    interleaved: bool = False,
) -> Array:
    """Rotate pairs of features by an angle proportional to the position.

        (x_a, x_b) ← c (x_a cos iω_j − x_b sin iω_j, x_a sin iω_j + x_b cos iω_j)

    Then qᵀk depends on the offset alone. ω_j and c are those of the rope. The angle iω_j is a
    float32 product, as in the models whose weights are in circulation.

    With several positions for each token, such as the row and the column of a patch of an image,
    each of the A axes turns 1/A of the pairs: the first axis the first, and so on.

    Args:
      x: `[..., T, N, H]`, floating point: queries or keys.
      positions: `[T]` or `[..., T]`, integer or floating point; or a tuple of A of these, one for
        each axis; None: 0 … T − 1.
      rope: a value of `jattn.ropes`; or frequencies `[J]` or `[..., J]`, an array; or for A axes
        also a tuple of A of these.
      features: R, how many features are turned, the first ones of a head; the others stay. None: as
        many as there are frequencies, or all H.
      length: of the sequence, an integer or integers `[...]`, for a rope that depends on it; None:
        the greatest position of each example + 1.
      interleaved: pairs are neighbours (2j, 2j + 1), as in the paper; otherwise halves
        (j, j + R/2), as in Llama and most weights in circulation.

    Returns:
      The shape and dtype of `x`; cosines, sines and products are computed in at least float32.

    Raises:
      ValueError: R is odd, above H or not a multiple of 2 A; or the positions or the frequencies do
        not fit.
      TypeError: x is not floating point.

    Papers: Su et al. 2021, https://arxiv.org/abs/2104.09864; two axes: Heo et al. 2024,
    https://arxiv.org/abs/2403.13298

    Example:
      >>> np.asarray(rotary(jnp.ones((2, 1, 2)))[1, 0]).round(2)
      array([-0.3 ,  1.38], dtype=float32)
      >>> rows, columns = np.divmod(np.arange(6), 3)
      >>> rotary(jnp.ones((6, 1, 8)), (rows, columns)).shape
      (6, 1, 8)
    """
    x = jnp.asarray(x)
    sizes = checks.assert_shapes(x=(x, "... T N H"))
    checks.assert_floating(x=x)
    batch, T, H = sizes["..."], sizes["T"], sizes["H"]
    axes = positions if isinstance(positions, tuple) else (positions,)
    for each in axes:
        if each is not None and np.shape(each) not in {(T,), (*batch, T)}:
            must = f"positions must be [T] or [..., T] for x of shape {x.shape}"
            raise ValueError(f"{must}, got {np.shape(each)}")
    _check_length(length, batch)
    ropes = rope if isinstance(rope, tuple) else (rope,) * len(axes)
    if not axes or len(ropes) != len(axes):
        raise ValueError(f"rope must have one entry for each axis, {len(axes)}, got {len(ropes)}")
    R, of_axis = _turned(ropes, features, H, batch)
    angles = [
        _rope_angles(T if each is None else each, rope, of_axis, length)
        for each, rope in zip(axes, ropes, strict=True)
    ]
    dtype = dtypes.accumulator(x.dtype)
    sin, cos = (
        jnp.concatenate([wave[(None,) * (x.ndim - wave.ndim)] for wave in waves], axis=-1)
        for waves in zip(*(_waves(*each, dtype) for each in angles), strict=True)
    )
    pairs = "... (J two) -> two ... J" if interleaved else "... (two J) -> two ... J"
    a, b = rearrange(x[..., :R].astype(dtype), pairs, two=2)
    rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos])
    back = "two ... J -> ... (J two)" if interleaved else "two ... J -> ... (two J)"
    rotated = rearrange(rotated, back).astype(x.dtype)
    return rotated if R == H else jnp.concatenate([rotated, x[..., R:]], axis=-1)


def _check_length(length: Any, batch: tuple[int, ...]) -> None:
    if length is None or jax.export.is_symbolic_dim(length):
        return
    checks.assert_integers(length=length)
    if np.shape(length) not in {(), batch}:
        must = f"length must be one integer or one for each example, {batch}"
        raise ValueError(f"{must}, got shape {np.shape(length)}")
    checks.assert_in_range("length", length, 0, 2**31 - 1, "the greatest of 32 bits")


def _turned(
    ropes: tuple[Any, ...], features: int | None, H: int, batch: tuple[int, ...]
) -> tuple[int, int]:
    """R, how many features of a head are turned, and how many of these by each axis."""
    arrays = [rope for rope in ropes if not isinstance(rope, Rope)]
    for array in arrays:
        checks.assert_floating(rope=array)
        if np.ndim(array) == 0 or np.shape(array)[:-1] not in {(), batch}:
            must = f"rope must be frequencies [J] or [..., J] with leading axes {batch}"
            raise ValueError(f"{must}, got shape {np.shape(array)}")
    own = [2 * np.shape(array)[-1] for array in arrays]
    R = features
    if len(own) == len(ropes):  # the arrays say how many
        R = sum(own)
        if features not in {None, R}:
            raise ValueError(f"features = {features}, but the frequencies are of {R} features")
    elif own:
        raise TypeError("rope must hold values of jattn.ropes or arrays, not both")
    R = H if R is None else R
    if not 0 < R <= H or R % (2 * len(ropes)):
        must = f"features must be a multiple of {2 * len(ropes)} (pairs of sine and cosine"
        several = "" if len(ropes) == 1 else f", {len(ropes)} axes"
        raise ValueError(f"{must}{several}), up to the width of a head, H = {H}; got {R}")
    return R, R // len(ropes)


def _rope_angles(
    positions: int | Array, rope: Any, features: int, length: Any
) -> tuple[np.ndarray | Array, float]:
    """Float32 angles `[..., T, 1, J]`, NumPy's where all is known, and the factor of the waves."""
    places, scale = _as_positions(positions), 1.0
    if isinstance(rope, Rope):
        if length is None and rope.depends_on_length:
            length = places.max(-1, initial=-1) + 1
        frequencies, scale = rope.frequencies(features, length), rope.scale
    else:
        concrete = checks.concrete(rope)
        frequencies = jnp.asarray(rope) if concrete is None else concrete
    places = places.astype(np.float32)[..., None]  # [..., T, 1]
    frequencies = frequencies.astype(np.float32)[..., None, :]  # [..., 1, J]
    lead = max(places.ndim, frequencies.ndim)
    places, frequencies = (
        each.reshape((1,) * (lead - each.ndim) + each.shape) for each in (places, frequencies)
    )
    return (places * frequencies)[..., None, :], scale


def _waves(angles: np.ndarray | Array, scale: float, dtype: np.dtype) -> tuple[Array, Array]:
    """Sine and cosine times their factor; those of known angles are rounded once."""
    xp, wide = (np, np.float64) if isinstance(angles, np.ndarray) else (jnp, dtype)
    angles = angles.astype(wide)
    return jnp.asarray(xp.sin(angles) * scale, dtype), jnp.asarray(xp.cos(angles) * scale, dtype)


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
