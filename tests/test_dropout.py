"""Dropout of weights: its rate, its independence, its ends, its gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn

B, T, S, N, K, H, V = 2, 5, 7, 6, 2, 3, 11


def operands(rng, dtype=np.float64, N=N, K=K, V=V):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def drop(key, rate, shape=(B, 61, 3, 67)):
    """Which weights `[B, N, T, S]` are kept, read off the output.

    The weights are uniform, over one-hot values.
    """
    B, T, N, S = shape
    query, key_ = jnp.zeros((B, T, N, 2)), jnp.zeros((B, S, N, 2))
    value = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, N, S))
    output = jax.jit(
        lambda key: jattn.attend(query, key_, value, dropout_rate=rate, dropout_key=key)
    )(key)
    weights = np.asarray(output).swapaxes(1, 2)
    np.testing.assert_allclose(weights[weights > 0], 1 / S / (1 - rate), rtol=1e-5)
    return weights > 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_at_its_rate_everywhere(rate):
    """Every margin lies within 5 standard deviations of a binomial.

    That leaves a chance of 6e-7 for each of ~270 counts.
    """
    kept = drop(jax.random.key(7), rate)
    for axes in [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:
        share, size = kept.mean(axes), math.prod(kept.shape[axis] for axis in axes)
        assert (np.abs(share - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / size)).all()


def test_dropout_of_rows_columns_heads_examples_and_keys_is_uncorrelated():
    """Correlations of M pairs are near normal with deviation 1/√M; 5 of them are allowed."""
    kept = 2.0 * drop(jax.random.key(7), 0.5) - 1
    other = 2.0 * drop(jax.random.key(8), 0.5) - 1
    pairs = {"keys of JAX": (kept, other)}
    for axis, name in enumerate(("examples", "heads", "rows", "columns")):
        for lag in (1, 2, 3, 32) if kept.shape[axis] > 32 else (1,):
            size = kept.shape[axis] - lag
            pairs[f"{name} {lag} apart"] = tuple(
                np.take(kept, np.arange(size) + by, axis) for by in (0, lag)
            )
    pairs["across the diagonal"] = kept[..., :61], kept[..., :61].swapaxes(-1, -2)
    diagonal = kept[..., 1:, 1:], kept[..., :-1, :-1]
    pairs["along the diagonal"] = diagonal
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size), name
    rows = kept.reshape(-1, kept.shape[-1])  # no two of the 366 rows are alike
    products = rows @ rows.T / rows.shape[1] - np.eye(len(rows))
    assert np.abs(products).max() < 6.5 / math.sqrt(rows.shape[1])


def test_dropout_at_its_ends(rng):
    query, key, value = operands(rng, np.float32)
    attend = functools.partial(jattn.attend, query, key, value, dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(attend(dropout_rate=0.0), jattn.attend(query, key, value))
    np.testing.assert_array_equal(attend(dropout_rate=0), jattn.attend(query, key, value))
    assert (attend(dropout_rate=1.0) == 0).all()
    assert jnp.isfinite(attend(dropout_rate=1 - 1e-12)).all()


def test_dropout_is_a_function_of_its_key(rng):
    query, key, value = operands(rng, np.float32)
    attend = jax.jit(
        lambda key_: jattn.attend(query, key, value, dropout_rate=0.5, dropout_key=key_)
    )
    new, old = attend(jax.random.key(3)), attend(jax.random.PRNGKey(3))
    np.testing.assert_array_equal(new, attend(jax.random.key(3)))
    np.testing.assert_array_equal(new, old)
    assert not np.allclose(new, attend(jax.random.key(4)))


def test_the_gradient_of_dropout_is_that_of_the_dropped_weights(rng, x64):
    query, key, value = operands(rng, N=3, K=3)
    kept = drop(jax.random.key(5), 0.4, (B, T, 3, S)).astype(np.float64)
    cotangent = rng.standard_normal((B, T, 3, V))

    def loss(query, key, value):
        output = jattn.attend(query, key, value, dropout_rate=0.4, dropout_key=jax.random.key(5))
        return (output * cotangent).sum()

    def truth(query, key, value):
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(H)
        weights = jax.nn.softmax(logits) * kept / 0.6
        return (jnp.einsum("bnts,bsnv->btnv", weights, value) * cotangent).sum()

    came, expected = (
        jax.jit(jax.grad(f, argnums=(0, 1, 2)))(query, key, value) for f in (loss, truth)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), came, expected
    )
