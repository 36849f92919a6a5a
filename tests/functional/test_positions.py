"""Position codes against their closed forms in float64.

Far positions and the relative properties are among them.
"""

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


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "must be even, got 5", lambda: positions.sinusoidal_encoding(3, 5)),
        (ValueError, "must be even, got 0", lambda: positions.sinusoidal_encoding(3, 0)),
        (ValueError, "must not be negative, got -3", lambda: positions.sinusoidal_encoding(-3, 4)),
        (ValueError, "must be even, got 7", lambda: positions.sinusoidal_rotation(3, 7)),
        (ValueError, "offset", lambda: positions.sinusoidal_rotation(np.array([1.0, 2.0]), 4)),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()
