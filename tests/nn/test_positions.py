"""Position modules: what they add, their dropout, their limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.nn import LearnedPositions, SinusoidalPositions

B, T, D = 2, 5, 6


def test_sinusoidal_positions_add_the_closed_form(rng, x64):
    x = rng.standard_normal((B, T, D))
    encoding = [
        [(math.cos if j % 2 else math.sin)(i / 10000 ** ((j - j % 2) / D)) for j in range(D)]
        for i in range(T)
    ]
    module = SinusoidalPositions(D)
    np.testing.assert_allclose(module(x), x + np.array(encoding), rtol=1e-14)
    np.testing.assert_array_equal(module(x[0]), module(x)[0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(module))(x), module(x))
    assert module(jnp.zeros((0, D))).shape == (0, D) and module(jnp.zeros((10_007, D))).shape == (
        10_007,
        D,
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_sinusoidal_positions_keep_the_dtype(dtype):
    assert SinusoidalPositions(D)(jnp.zeros((T, D), dtype)).dtype == dtype


def test_dropout_is_of_the_sum_and_follows_train_and_eval():
    module = SinusoidalPositions(D, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = jnp.full((97, D), 3.0)
    clean = SinusoidalPositions(D)(x)
    dropped = module(x)
    assert 0.3 < float((dropped == 0).mean()) < 0.7  # 582 draws: 10 standard deviations
    np.testing.assert_allclose(dropped[dropped != 0], 2 * clean[dropped != 0], rtol=1e-6)
    assert not np.array_equal(module(x), dropped)
    np.testing.assert_array_equal(module(x, deterministic=True), clean)
    module.eval()
    np.testing.assert_array_equal(module(x), clean)
    assert not np.array_equal(module(x, deterministic=False), clean)


def test_learned_positions_add_the_rows_of_the_table(rng):
    module = LearnedPositions(7, D, rngs=nnx.Rngs(0))
    table, x = np.asarray(module.embedding[...]), rng.standard_normal((B, T, D)).astype(np.float32)
    assert table.shape == (7, D) and np.unique(table).size == 7 * D
    np.testing.assert_array_equal(module(x), x + table[:T])
    assert module(jnp.zeros((7, D))).shape == (7, D)
    gradient = nnx.grad(lambda module: (module(x) * x).sum())(module).embedding[...]
    np.testing.assert_allclose(gradient, np.concatenate([x.sum(0), np.zeros((2, D))]), rtol=1e-6)


def test_the_table_has_the_dtype_asked_for():
    module = LearnedPositions(7, D, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert (
        module.embedding.dtype == jnp.bfloat16
        and module(jnp.zeros((T, D), jnp.bfloat16)).dtype == jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "must be even, got 5", lambda: SinusoidalPositions(5)),
        (
            ValueError,
            "dropout_rate = 0.1 needs rngs",
            lambda: SinusoidalPositions(4, dropout_rate=0.1),
        ),
        (ValueError, "dropout_rate must", lambda: SinusoidalPositions(4, dropout_rate=-0.1)),
        (
            ValueError,
            "dropout_rate must",
            lambda: SinusoidalPositions(4, dropout_rate=1.5, rngs=nnx.Rngs(0)),
        ),
        (
            ValueError,
            r"x must be \[..., length, 4\], got shape \(5, 6\)",
            lambda: SinusoidalPositions(4)(np.zeros((5, 6))),
        ),
        (ValueError, r"x must be .*got shape \(4,\)", lambda: SinusoidalPositions(4)(np.zeros(4))),
        (
            TypeError,
            "x must be floating point, got int",
            lambda: SinusoidalPositions(4)(np.zeros((5, 4), int)),
        ),
        (
            ValueError,
            "length 8, beyond the 7",
            lambda: LearnedPositions(7, 4, rngs=nnx.Rngs(0))(np.zeros((8, 4))),
        ),
        (
            ValueError,
            r"x must be .*4\], got",
            lambda: LearnedPositions(7, 4, rngs=nnx.Rngs(0))(np.zeros((5, 3))),
        ),
        (
            TypeError,
            "floating",
            lambda: LearnedPositions(7, 4, rngs=nnx.Rngs(0))(np.zeros((5, 4), int)),
        ),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()


MODULES = {
    "sinusoidal": lambda: SinusoidalPositions(4),
    "learned": lambda: LearnedPositions(9, 4, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_positions_may_be_given_for_all_or_for_each_example(rng, make):
    module = make()
    x = jnp.asarray(rng.normal(size=(2, 9, 4)), jnp.float32)
    expected = module(x)
    found = module(x[:, 3:5], positions=jnp.array([3, 4]))
    np.testing.assert_allclose(found, expected[:, 3:5], rtol=1e-6)
    each = jnp.array([[3, 4], [0, 8]])
    picked, truth = (jnp.take_along_axis(y, each[..., None], axis=1) for y in (x, expected))
    found = jax.jit(lambda x, positions: module(x, positions=positions))(picked, each)
    np.testing.assert_allclose(found, truth, rtol=1e-5)
    with pytest.raises(ValueError, match=r"positions must be \[T\] or \[..., T\]"):
        module(x, positions=jnp.arange(3))


def test_a_learned_position_beyond_the_table_is_refused_and_under_jit_nan():
    module = LearnedPositions(9, 4, rngs=nnx.Rngs(0))
    x, beyond = jnp.ones((1, 2, 4)), jnp.array([8, 9])
    with pytest.raises(ValueError, match="positions must lie in 0 … 8"):
        module(x, positions=beyond)
    found = jax.jit(lambda x, positions: module(x, positions=positions))(x, beyond)
    assert np.isnan(found[:, 1]).all() and np.isfinite(found[:, 0]).all()
