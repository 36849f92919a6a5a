"""What all modules have in common: attend= and use_bias."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import masks, modifiers, nn
from jattn.functional import compat
from jattn.nn._shared import Linear
from jattn.nn.transformer_layers import silu

B, T, D = 2, 4, 6

ATTENDING = {
    "dot": lambda **o: nn.DotProductAttention(**o),
    "cosine": lambda **o: nn.CosineAttention(**o),
    "bilinear": lambda **o: nn.BilinearAttention(D, D, **o),
    "additive": lambda **o: nn.AdditiveAttention(D, D, 3, **o),
    "kernel": lambda **o: nn.NadarayaWatson(**o),
    "heads": lambda **o: nn.MultiHeadAttention(2, D, **o),
    "single": lambda **o: nn.SelfAttention(D, D, **o),
    "shared": lambda **o: nn.SharedProjectionAttention(2, D, **o),
    "residual": lambda **o: nn.ResidualAttention(nn.SelfAttention(D, D, **o), D, rngs=o["rngs"]),
    "feature": lambda **o: nn.FeaturePooling(D, **o),
    "hops": lambda **o: nn.MultiHopPooling(D, 2, **o),
    "query": lambda **o: nn.LearnedQueryPooling(D, **o),
}
NETWORKS = {
    "rnn": lambda **o: nn.RNN(D, 3, **o),
    "lstm": lambda **o: nn.LSTM(D, 3, **o),
    "gru": lambda **o: nn.GRU(D, 3, **o),
}
POOLINGS = {"feature", "hops", "query"}


def build(name, makers=ATTENDING, **options):
    return makers[name](rngs=nnx.Rngs(params=0, dropout=1), **options)


def arguments(name, x):
    return (x, x, x) if name in ("dot", "cosine", "bilinear", "additive", "kernel") else (x,)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)


@pytest.mark.parametrize("shape", [(D,), (T, D), (B, T, D), (3, B, T, D), (0, T, D)])
def test_on_one_cpu_the_rows_of_a_linear_make_one_matrix(shape, rng, monkeypatch):
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    linear = Linear(D, 3, rngs=nnx.Rngs(0))

    def loss(linear, x):
        return jnp.sum(jnp.sin(linear(x)))

    def both():
        mapped = jax.vmap(linear)(x) if x.ndim > 1 else None
        return linear(x), mapped, nnx.grad(loss, argnums=(0, 1))(linear, x)

    several = both()
    monkeypatch.setattr(compat, "one_cpu_device", lambda: True)
    chex.assert_trees_all_close(both(), several, rtol=1e-5, atol=1e-6)
    program = str(jax.make_jaxpr(lambda x: linear(x))(x))
    assert x.ndim == 1 or f"[{math.prod(shape[:-1])},3] = dot_general" in program
    half = Linear(D, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half(x).dtype == jnp.bfloat16 and half(x).shape == (*shape[:-1], 3)


def test_on_one_cpu_explicit_meshes_keep_their_axes(x, monkeypatch):
    monkeypatch.setattr(compat, "one_cpu_device", lambda: True)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    linear, mlp = Linear(D, 4, rngs=nnx.Rngs(0)), nn.FeedForward(D, 8, rngs=nnx.Rngs(0))
    heads = nn.MultiHeadAttention(2, D, rngs=nnx.Rngs(0))
    expected = linear(x), mlp(x), heads(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(None, "x")))
        replicated = jax.device_put(x, NamedSharding(mesh, P()))
        found = (
            linear(replicated, out_sharding=P(None, "x", None)),
            mlp(placed),
            heads(replicated, out_sharding=P(None, None, "x")),
        )
        specs = [each.sharding.spec for each in found]
        assert specs[0][1] == specs[1][1] == specs[2][2] == "x"
        chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-5, atol=1e-6)


def test_a_dropout_of_whole_axes_sees_all_axes(rng, monkeypatch):
    monkeypatch.setattr(compat, "one_cpu_device", lambda: True)
    mlp = nn.FeedForward(D, 64, rngs=nnx.Rngs(0))
    mlp.dropout = nnx.Dropout(0.5, broadcast_dims=(-2,), rngs=nnx.Rngs(1))
    output = mlp(jnp.ones((3, T, D)), deterministic=False)
    np.testing.assert_allclose(output, output[:, :1].repeat(T, axis=1), rtol=1e-6)
    assert not np.allclose(output[0], output[1])


@pytest.mark.parametrize("one", [False, True])
def test_an_activation_of_ones_own_sees_all_axes(one, x, monkeypatch):
    monkeypatch.setattr(compat, "one_cpu_device", lambda: one)

    def among_tokens(x):
        return jax.nn.softmax(x, axis=-2)

    for kind in (nn.FeedForward, nn.GatedFeedForward):
        plain, other = (kind(D, 8, rngs=nnx.Rngs(0), activation=f) for f in (silu, among_tokens))
        assert plain(x).shape == other(x).shape == x.shape
        alone = jnp.stack([other(each) for each in x])
        np.testing.assert_allclose(other(x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ATTENDING)
def test_masks_of_the_partial_and_of_the_call_join(name, x):
    one, two = masks.sliding_window(2, 2), masks.from_array(np.arange(T) != 1)
    partial = functools.partial(jattn.attend, mask=one)
    call = functools.partial(build(name, attend=partial), *arguments(name, x))
    plain = functools.partial(build(name), *arguments(name, x))
    np.testing.assert_array_equal(call(mask=two), plain(mask=one & two))
    assert not np.allclose(call(mask=two), plain(mask=two))
    assert not np.allclose(call(mask=two), call())


@pytest.mark.parametrize("name", ATTENDING)
def test_modifiers_of_the_partial_run_first(name, x):
    one, two = (lambda s, *_: jnp.sin(3 * s)), (lambda s, b, h, q, k: s * (k + 1.0))
    partial = functools.partial(jattn.attend, modifier=one)
    with jax.numpy_dtype_promotion("standard"):
        call = functools.partial(build(name, attend=partial), *arguments(name, x))
        plain = functools.partial(build(name), *arguments(name, x))
        np.testing.assert_array_equal(call(modifier=two), plain(modifier=(one, two)))
        assert not np.allclose(call(modifier=two), plain(modifier=(two, one)))


@pytest.mark.parametrize("name", ATTENDING)
def test_what_is_given_twice_is_an_error(name, x):
    positions = np.arange(T), np.arange(T)
    module = build(name, attend=functools.partial(jattn.attend, positions=positions))
    with pytest.raises(TypeError, match="positions: given twice, by attend= and by the module"):
        module(*arguments(name, x), positions=positions)
    with pytest.raises(TypeError, match="return_weights cannot be part of it"):
        build(name, attend=functools.partial(jattn.attend, return_weights=True))


@pytest.mark.parametrize("name", ATTENDING)
def test_state_inside_the_partial_is_refused(name):
    def make(bias):
        build(name, attend=functools.partial(jattn.attend, modifier=modifiers.bias(bias)))

    make(jnp.ones((T, T)))
    with pytest.raises(TypeError, match="attend holds a traced array"):
        jax.jit(make)(jnp.ones((T, T)))
    parameter = nnx.Param(jnp.ones((T, T)))
    with pytest.raises(ValueError, match=r"attend holds an nnx\.Param"):
        build(name, attend=functools.partial(jattn.attend, modifier=lambda s, *_: s + parameter))


EXPORTED = {
    **ATTENDING, **NETWORKS,
    "sinusoidal": lambda rngs: nn.SinusoidalPositions(D),
    "learned": lambda rngs: nn.LearnedPositions(9, D, rngs=rngs),
    "embedding": lambda rngs: nn.Embedding(9, D, padding_idx=0, max_norm=1.0, rngs=rngs),
}  # fmt: skip


BIASED = {
    "heads": ATTENDING["heads"], "single": ATTENDING["single"],
    **{name: ATTENDING[name] for name in sorted(POOLINGS)}, **NETWORKS,
    "rnn_cell": lambda **o: nn.RNNCell(D, 3, **o),
    "lstm_cell": lambda **o: nn.LSTMCell(D, 3, **o),
    "gru_cell": lambda **o: nn.GRUCell(D, 3, **o),
}  # fmt: skip


@pytest.mark.parametrize("flag", [1, "True"], ids=repr)
@pytest.mark.parametrize("name", BIASED)
def test_use_bias_is_true_or_false(name, flag):
    with pytest.raises(TypeError, match=f"use_bias must be True or False, got {flag!r}"):
        build(name, BIASED, use_bias=flag)


def test_modules_that_are_built_anew_have_an_equal_graphdef():
    first, second = (nn.MultiHeadAttention(2, 4, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert nnx.graphdef(first) == nnx.graphdef(second)
