"""Position codes against their closed forms in float64.

Far positions and the relative properties are among them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import positions

D = 6
FLOAT32_ROUNDING = 2.0**-24  # half an ulp of numbers below 1
POSITIONS = np.array([0, 1, 2, 1000, 65537, 999983])


def encoding(i, j, features, base=10000.0):
    """P[i, j] of the paper, with Python floats."""
    angle = i / base ** ((j - j % 2) / features)
    return math.cos(angle) if j % 2 else math.sin(angle)


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_sinusoidal_encoding_is_the_closed_form_however_far(base):
    truth = np.array([[encoding(int(i), j, D, base) for j in range(D)] for i in POSITIONS])
    for given in (POSITIONS, jnp.asarray(POSITIONS), POSITIONS.astype(np.float32), list(POSITIONS)):
        came = positions.sinusoidal_encoding(given, D, base=base)
        assert came.dtype == jnp.float32
        np.testing.assert_allclose(came, truth, rtol=0, atol=FLOAT32_ROUNDING)
    length = positions.sinusoidal_encoding(4, D, base=base)
    np.testing.assert_array_equal(
        length[:3], positions.sinusoidal_encoding(POSITIONS[:3], D, base=base)
    )


def test_sinusoidal_encoding_takes_any_shape_and_precision(x64):
    assert positions.sinusoidal_encoding(0, 4).shape == (0, 4)
    batch = positions.sinusoidal_encoding(POSITIONS.reshape(2, 3), D)
    assert batch.shape == (2, 3, D) and batch.dtype == jnp.float64
    truth = [encoding(int(i), j, D) for i in POSITIONS for j in range(D)]
    # An angle of 1e6 has an ulp of 1e-10
    np.testing.assert_allclose(batch.ravel(), truth, rtol=0, atol=1e-10)


def test_traced_positions_agree_within_the_rounding_of_their_angle():
    near = np.arange(97)
    traced = jax.jit(lambda positions_: positions.sinusoidal_encoding(positions_, D))(near)
    np.testing.assert_allclose(
        traced, positions.sinusoidal_encoding(97, D), rtol=0, atol=2 * 97 * FLOAT32_ROUNDING
    )


@pytest.mark.parametrize("offset", [0, 3, -2, 2.5, 1000])
def test_a_rotation_shifts_the_encoding_from_anywhere(offset, x64):
    """P[i + δ] = R(δ) P[i]: one matrix for every i.

    It is orthogonal, of determinant 1, and R(a + b) = R(a) R(b).
    """
    rotation = np.asarray(positions.sinusoidal_rotation(offset, D))
    for i in (0, 7, 1013):
        here, there = ([encoding(at, j, D) for j in range(D)] for at in (i, i + offset))
        np.testing.assert_allclose(rotation @ here, there, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(D), rtol=0, atol=1e-15)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, rtol=1e-14)
    twice = positions.sinusoidal_rotation(2 * offset, D)
    np.testing.assert_allclose(rotation @ rotation, twice, rtol=0, atol=1e-12)
    traced = jax.jit(lambda offset: positions.sinusoidal_rotation(offset, D))(offset)
    np.testing.assert_allclose(traced, rotation, rtol=0, atol=1e-12)


def rotated(x, position, interleaved, base=10000.0):
    """One head vector as complex numbers: pair j turns by position · base^(−2j/H)."""
    width = len(x)
    first, second = (x[0::2], x[1::2]) if interleaved else (x[: width // 2], x[width // 2 :])
    angles = position * base ** (-2.0 * np.arange(width // 2) / width)
    turned = (first + 1j * second) * np.exp(1j * angles)
    out = np.empty(width)
    if interleaved:
        out[0::2], out[1::2] = turned.real, turned.imag
    else:
        out[: width // 2], out[width // 2 :] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("per_example", [True, False])
def test_rotary_turns_pairs_as_complex_numbers(interleaved, per_example, rng):
    B, T, N, H = 2, 5, 3, 6
    x = rng.standard_normal((B, T, N, H)).astype(np.float32)
    own = rng.integers(0, 100_000, (B, T) if per_example else T)
    came = positions.rotary(x, own, interleaved=interleaved)
    for b, t, n in np.ndindex(B, T, N):
        truth = rotated(
            x[b, t, n].astype(np.float64), own[b, t] if per_example else own[t], interleaved
        )
        np.testing.assert_allclose(
            came[b, t, n], truth, rtol=0, atol=6 * FLOAT32_ROUNDING * np.abs(x).max()
        )
    default = positions.rotary(x, interleaved=interleaved)
    np.testing.assert_array_equal(
        default, positions.rotary(x, np.arange(T), interleaved=interleaved)
    )


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_scores_depend_on_the_offset_alone(interleaved, rng, x64):
    query, key = rng.standard_normal((2, 1, 1, 8))
    turn = functools.partial(positions.rotary, interleaved=interleaved)

    def score(i, j):
        return float(jnp.vdot(turn(query, np.array([i])), turn(key, np.array([j]))))

    for offset in (-3, 0, 11):
        expected = score(100 + offset, 100)
        assert score(7 + offset, 7) == pytest.approx(expected, abs=1e-12)
        assert score(5003 + offset, 5003) == pytest.approx(expected, abs=1e-11)
    assert score(3, 0) != pytest.approx(score(0, 3), abs=1e-3)
    assert score(5, 5) == pytest.approx(float(jnp.vdot(query, key)), abs=1e-12)


def test_half_rotation_is_interleaved_rotation_of_permuted_features(rng, x64):
    x = rng.standard_normal((5, 3, 8))
    order = np.arange(8).reshape(2, 4).T.ravel()
    halves = positions.rotary(x, interleaved=False)
    np.testing.assert_array_equal(positions.rotary(x[..., order])[..., np.argsort(order)], halves)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rotary_of_half_precision_rounds_once(dtype, rng):
    x = jnp.asarray(rng.standard_normal((5, 3, 8)), dtype)
    came = positions.rotary(x)
    exact = positions.rotary(x.astype(jnp.float32))
    assert came.dtype == dtype
    np.testing.assert_array_equal(came.astype(jnp.float32), exact.astype(dtype).astype(jnp.float32))


def test_rotary_under_jit_vmap_and_grad(rng, x64):
    x, own = rng.standard_normal((2, 5, 3, 4)), np.array([[0, 1, 2, 3, 4], [4, 0, 11, 2, 3]])
    whole = positions.rotary(x, own)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(positions.rotary))(x, own), whole, rtol=1e-12, atol=1e-14
    )
    _, pull = jax.vjp(lambda x: positions.rotary(x, own), x)
    # A rotation's transpose undoes it
    np.testing.assert_allclose(pull(whole)[0], x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "must be even, got 5", lambda: positions.sinusoidal_encoding(3, 5)),
        (ValueError, "must be even, got 0", lambda: positions.sinusoidal_encoding(3, 0)),
        (ValueError, "must not be negative, got -3", lambda: positions.sinusoidal_encoding(-3, 4)),
        (ValueError, "must be even, got 7", lambda: positions.sinusoidal_rotation(3, 7)),
        (ValueError, "offset", lambda: positions.sinusoidal_rotation(np.array([1.0, 2.0]), 4)),
        (
            ValueError,
            "must be even, got 3",
            lambda: positions.rotary(np.zeros((5, 1, 3), np.float32)),
        ),
        (
            ValueError,
            r"x must be \[..., T, N, H\]",
            lambda: positions.rotary(np.zeros((5, 4), np.float32)),
        ),
        (
            TypeError,
            "x must be floating point",
            lambda: positions.rotary(np.zeros((5, 1, 4), np.int32)),
        ),
        (
            ValueError,
            r"positions must be .*got \(7,\)",
            lambda: positions.rotary(np.zeros((5, 1, 4), np.float32), np.arange(7)),
        ),
        (
            ValueError,
            r"positions must be .*got \(\)",
            lambda: positions.rotary(np.zeros((5, 1, 4), np.float32), 5),
        ),
        (
            ValueError,
            r"positions must be .*got \(1, 5\)",
            lambda: positions.rotary(np.zeros((2, 5, 1, 4), np.float32), np.zeros((1, 5), int)),
        ),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()
