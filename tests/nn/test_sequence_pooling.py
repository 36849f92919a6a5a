"""Poolings over time against NumPy loops with the modules' own parameters."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.nn import FeaturePooling, LearnedQueryPooling, MultiHopPooling
from tests.nn.test_multi_head import affine, randomise
from tests.oracle import numerical_gradient

B, S, D, R, U = 3, 7, 5, 2, 11
LENGTHS = np.array([4, 7, 0])
NAMES = ["feature", "hops", "query"]


def make(name, **options):
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0), **options}
    return {
        "feature": lambda: FeaturePooling(D, **options),
        "hops": lambda: MultiHopPooling(D, R, **options),
        "query": lambda: LearnedQueryPooling(D, U, **options),
    }[name]()


def truth(name, module, steps):
    """Context and weights of a sequence's real steps `[length, D]`, by the rows' equations."""
    if name == "hops":
        bias = 0 if module.bias is None else np.asarray(module.bias[...])
        scores = steps @ np.asarray(module.query[...]).T + bias
    else:
        scores = np.tanh(affine(module.key, steps))
        scores = scores if name == "feature" else scores @ np.asarray(module.query[...])[:, None]
    weights, context = np.zeros_like(scores), np.zeros((scores.shape[1], D))
    for column, entries in enumerate(scores.T):
        total = math.fsum(math.exp(entry) for entry in entries)
        for t, entry in enumerate(entries):
            weights[t, column] = math.exp(entry) / total
            context[column] += weights[t, column] * steps[t]
    if name == "feature":
        return np.diagonal(context), weights  # feature d with the weights of column d
    return (context, weights.T) if name == "hops" else (context[0], weights[:, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_pooling_is_the_loop(name, use_bias, rng, x64):
    module, x = randomise(make(name, use_bias=use_bias), rng), rng.standard_normal((B, S, D))
    call = nnx.jit(lambda m, x, lengths: (m(x), *m(x, lengths=lengths, return_weights=True)))
    whole, context, weights = call(module, x, LENGTHS)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(whole[b], truth(name, module, x[b])[0], rtol=1e-12, atol=1e-13)
        expected, expected_weights = truth(name, module, x[b, :length])
        np.testing.assert_allclose(context[b], expected, rtol=1e-12, atol=1e-13)
        inside, past = np.split(
            np.asarray(weights[b]), [length], axis=0 if name == "feature" else -1
        )
        np.testing.assert_allclose(inside, expected_weights, rtol=1e-12, atol=1e-13)
        assert not past.any()


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_past_the_end_is_not_seen(name, rng, x64):
    module, clean = randomise(make(name), rng), rng.standard_normal((B, S, D))
    past = np.arange(S) >= LENGTHS[:, None]
    dirty = np.where(past[..., None], np.nan, clean)

    def total(module, x):
        context, weights = module(x, lengths=LENGTHS, return_weights=True)
        return jnp.sum(context**3) + jnp.sum(weights**2), context

    gradient = nnx.jit(nnx.value_and_grad(total, argnums=(0, 1), has_aux=True))
    from_clean, from_dirty = gradient(module, clean), gradient(module, dirty)
    chex.assert_trees_all_equal(from_clean, from_dirty)
    assert np.isfinite(from_dirty[1][1]).all() and not from_dirty[1][1][past].any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_slopes_of_the_loop(name, rng, x64):
    module, x = randomise(make(name), rng), rng.standard_normal((S, D))
    cotangent = rng.standard_normal(truth(name, module, x)[0].shape)
    loss = nnx.grad(lambda m, x: (m(x) * cotangent).sum(), argnums=(0, 1))
    gradient, of_x = nnx.jit(loss)(module, x)
    slopes = numerical_gradient(lambda x: (truth(name, module, x)[0] * cotangent).sum(), x)
    np.testing.assert_allclose(of_x, slopes, rtol=1e-6, atol=1e-8)
    parameters = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    for path, slope in nnx.to_flat_state(gradient):

        def moved(array, path=path):
            kept, parameters[path][...] = parameters[path][...], jnp.asarray(array)
            nnx.update(module, nnx.from_flat_state(parameters.items()))
            came = (truth(name, module, x)[0] * cotangent).sum()
            parameters[path][...] = kept
            nnx.update(module, nnx.from_flat_state(parameters.items()))
            return came

        np.testing.assert_allclose(
            slope[...], numerical_gradient(moved, parameters[path][...]), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_any_leading_axes_and_vmap(name, lead, rng, x64):
    module, x = make(name), rng.standard_normal((*lead, S, D))
    lengths = np.asarray(rng.integers(0, S + 1, lead))
    pool = jax.jit(lambda x, lengths: module(x, lengths=lengths))
    flat = pool(x.reshape(-1, S, D), lengths.reshape(-1))
    np.testing.assert_allclose(pool(x, lengths).reshape(flat.shape), flat, rtol=1e-12, atol=1e-14)
    mapped = jax.jit(jax.vmap(pool))(x.reshape(-1, S, D), lengths.reshape(-1))
    np.testing.assert_allclose(mapped, flat, rtol=1e-12, atol=1e-14)


def test_one_hop_of_projected_steps_is_one_learned_query(rng, x64):
    """It reduces to multi-hop pooling where the values are the projected steps themselves."""
    hops, query = (
        MultiHopPooling(U, 1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        randomise(make("query"), rng),
    )
    x = rng.standard_normal((B, S, D))
    hops.query[...] = query.query[None]
    _, weights = hops(jnp.tanh(query.key(x)), return_weights=True)
    np.testing.assert_allclose(query(x, return_weights=True)[1], weights[:, 0], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_outputs_have_the_dtype_asked_for(name):
    module = make(name, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert (
        nnx.eval_shape(lambda m, x: m(x), module, jnp.ones((B, S, D), jnp.bfloat16)).dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (
            ValueError,
            r"x must be \[..., length, 5\], got shape \(3, 7, 2\)",
            {"x": np.ones((B, S, R))},
        ),
        (ValueError, r"x must be .*got shape \(5,\)", {"x": np.ones(D)}),
        (TypeError, "x must be floating point", {"x": np.ones((B, S, D), int)}),
        (ValueError, r"lengths must be .*got shape \(3, 7\)", {"lengths": np.ones((B, S), int)}),
        (ValueError, "lengths must be .*got shape", {"lengths": np.ones((), int)}),
        (ValueError, "lengths must lie in 0 … 7", {"lengths": np.array([1, 8, 2])}),
        (ValueError, "lengths must lie in 0 … 7", {"lengths": np.array([1, -1, 2])}),
        (TypeError, "lengths must be integers", {"lengths": np.ones(B)}),
    ],
)
def test_bad_input_is_named(name, error, match, arguments, x64):
    arguments = {"x": np.ones((B, S, D)), **arguments}
    with pytest.raises(error, match=match):
        make(name)(arguments.pop("x"), **arguments)


@pytest.mark.parametrize(
    ("match", "build"),
    [
        ("features must be", lambda rngs: FeaturePooling(0, rngs=rngs)),
        ("features must be", lambda rngs: MultiHopPooling(0, R, rngs=rngs)),
        ("num_hops must be", lambda rngs: MultiHopPooling(D, 0, rngs=rngs)),
        ("features must be", lambda rngs: LearnedQueryPooling(0, rngs=rngs)),
        ("hidden_features must be", lambda rngs: LearnedQueryPooling(D, 0, rngs=rngs)),
    ],
)
def test_bad_sizes_are_named(match, build):
    with pytest.raises(ValueError, match=f"^{match}"):
        build(nnx.Rngs(0))
