"""A sink is one more column of scores, which is dropped after the softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores

B, T, S, N, K, H, V = 2, 5, 7, 6, 3, 4, 3
SINK = np.array([0.5, -1.0, 2.0, 0.0, 7.0, -30.0])
MASKS = {
    "none": {},
    "causal": {"mask": masks.causal()},
    "nothing to see": {"mask": masks.padding(np.array([0, 4]))},
    "modified": {"modifier": modifiers.soft_cap(2.0), "mask": masks.no_self()},
    "scored": {"score": scores.cosine},
}


@pytest.fixture
def attend(kernel):
    return functools.partial(jattn.attend_with_sink, implementation=kernel)


@pytest.fixture
def operands(rng, x64):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def with_a_column(query, key, value, sink, **options):
    """Weights and output by the definition: an appended column, softmax, the column dropped."""
    weights = jattn.attention_weights(query, key, **options)
    lse = jattn.attend(query, key, value, return_lse=True, implementation="dense", **options)[1]
    lse = jnp.moveaxis(lse, -1, -2)[..., None]
    x = jnp.where(weights > 0, jnp.log(weights) + lse, -jnp.inf)
    column = jnp.broadcast_to(jnp.reshape(sink, (-1, 1, 1)), (*x.shape[:-1], 1))
    weights = jax.nn.softmax(jnp.concatenate([x, column], -1), axis=-1)[..., :-1]
    return weights, jnp.einsum("bnts, bsnv -> btnv", weights, jnp.repeat(value, N // K, axis=2))


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_a_sink_is_a_column_that_is_dropped(attend, operands, options):
    weights, output = with_a_column(*operands, SINK, **options)
    found = attend(*operands, jnp.asarray(SINK), **options)
    np.testing.assert_allclose(found, output, rtol=1e-12, atol=1e-14)
    if attend.keywords["implementation"] == "dense":
        found = attend(*operands, jnp.asarray(SINK), return_weights=True, **options)
        np.testing.assert_allclose(found[1], weights, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_a_sink_is_minus_its_share_of_the_output(attend, operands, rng):
    """−Σ p_sink (dO · O), and zero, not NaN, where a query may see nothing."""
    options, cotangent = MASKS["nothing to see"], rng.normal(size=(B, T, N, V))

    def loss(sink, *operands):
        return (attend(*operands, sink, **options) * cotangent).sum()

    weights, output = with_a_column(*operands, SINK, **options)
    share_of_sink = 1 - weights.sum(-1)
    expected = -np.einsum("bnt, btnv, btnv -> n", share_of_sink, cotangent, output)
    found = jax.grad(loss, argnums=(0, 1, 2, 3))(jnp.asarray(SINK), *operands)
    np.testing.assert_allclose(found[0], expected, rtol=1e-10, atol=1e-12)
    for gradient in found[1:]:
        assert np.isfinite(gradient).all() and not np.asarray(gradient[0]).any()


def test_off_by_one_and_no_sink(attend, operands):
    query, key, value = operands
    output, lse = attend(query, key, value, return_lse=True)
    plain, plain_lse = jattn.attend(query, key, value, return_lse=True)
    np.testing.assert_allclose(lse, np.log1p(np.exp(plain_lse)), rtol=1e-12)
    np.testing.assert_allclose(output, plain * np.exp(plain_lse - lse)[..., None], rtol=1e-12)
    empty = {"mask": masks.padding(np.array([0, 4]))}
    none = attend(query, key, value, -np.inf, return_lse=True, **empty)
    assert not none[0][0].any() and np.isneginf(none[1][0]).all() and np.isfinite(none[0]).all()
    none = attend(query, key, value, -np.inf)
    np.testing.assert_array_equal(
        none, jattn.attend(query, key, value, implementation=attend.keywords["implementation"])
    )


def test_a_great_sink_loses_no_digits(attend, operands):
    """The running maximum of the scores does not know the sink: their ratio is taken last."""
    output = attend(*operands, 700.0)
    lse = jattn.attend(*operands, return_lse=True)[1]
    expected = jattn.attend(*operands) * np.exp(lse - 700.0)[..., None]
    np.testing.assert_allclose(output, expected, rtol=1e-10)
    assert np.isfinite(attend(*operands, 1e6)).all()


def test_bad_sinks_are_named(attend, operands):
    with pytest.raises(ValueError, match=r"shape \(\) or \(6,\), got shape \(3,\)"):
        attend(*operands, jnp.zeros(3))
    with pytest.raises(TypeError, match="sink must be floating point"):
        attend(*operands, 1)
