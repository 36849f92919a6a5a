"""What all modules have in common: attend=, dropout's switches, copies, export, Linen."""

import copy
import functools
import importlib.util
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jattn
from jattn import masks, modifiers, nn

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
DROPPING = {
    **{name: make for name, make in ATTENDING.items() if name not in {"kernel", *POOLINGS}},
    **{name: functools.partial(make, num_layers=2) for name, make in NETWORKS.items()},
    "sinusoidal": lambda **o: nn.SinusoidalPositions(D, **o),
}


def build(name, makers=ATTENDING, **options):
    return makers[name](rngs=nnx.Rngs(params=0, dropout=1), **options)


def arguments(name, x):
    return (x, x, x) if name in ("dot", "cosine", "bilinear", "additive", "kernel") else (x,)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)


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


@pytest.mark.parametrize("name", ATTENDING)
def test_copies_have_an_equal_graphdef_and_equal_numbers(name, x):
    module = build(name, attend=functools.partial(jattn.attend, mask=masks.causal()))
    others = [
        nnx.merge(*nnx.split(module)),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        nnx.clone(module),
        build(name, attend=functools.partial(jattn.attend, mask=masks.causal())),
    ]
    for other in others:
        assert nnx.graphdef(other) == nnx.graphdef(module)
        assert hash(nnx.graphdef(other)) == hash(nnx.graphdef(module))
        np.testing.assert_array_equal(other(*arguments(name, x)), module(*arguments(name, x)))
    plain = build(name)
    assert nnx.graphdef(plain) != nnx.graphdef(module)


@pytest.mark.parametrize("name", DROPPING)
def test_view_eval_and_the_argument_switch_dropout_alike(name, x):
    def output(module, **options):
        return first(module(*arguments(name, x), **options))

    module, still = build(name, DROPPING, dropout_rate=0.5), build(name, DROPPING)
    clean = output(still)
    assert not np.allclose(output(module), clean)
    np.testing.assert_array_equal(output(module, deterministic=True), clean)
    viewed = nnx.view(module, deterministic=True)
    np.testing.assert_array_equal(output(viewed), clean)
    assert not np.allclose(output(viewed, deterministic=False), clean)
    assert not np.allclose(output(module), clean)  # a view leaves the module as it is
    module.eval()
    np.testing.assert_array_equal(output(module), clean)
    assert not np.allclose(output(module, deterministic=False), clean)
    module.train()
    assert not np.allclose(output(module), clean)


EXPORTED = {
    **ATTENDING, **NETWORKS,
    "sinusoidal": lambda rngs: nn.SinusoidalPositions(D),
    "learned": lambda rngs: nn.LearnedPositions(9, D, rngs=rngs),
    "embedding": lambda rngs: nn.Embedding(9, D, padding_idx=0, max_norm=1.0, rngs=rngs),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_modules_export_with_symbolic_batch_and_length(name, x):
    module = build(name, EXPORTED)
    batch, length = jax.export.symbolic_shape("b, t", constraints=["t <= 9", "t >= 1"])
    shape, dtype = (batch, length, D), jnp.float32
    if name == "embedding":
        x, shape, dtype = jnp.arange(B * T).reshape(B, T), (batch, length), jnp.int32
    call = jax.jit(lambda x: jax.tree.leaves(module(*arguments(name, x))))
    exported = jax.export.export(call)(jax.ShapeDtypeStruct(shape, dtype))
    if importlib.util.find_spec("flatbuffers"):  # which JAX needs to serialise
        exported = jax.export.deserialize(exported.serialize())
    for came, expected in zip(exported.call(x), call(x), strict=True):
        np.testing.assert_allclose(came, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "heads", "hops"])
def test_modules_bridge_to_linen(name, x):
    kinds = {
        "lstm": (nn.LSTM, D, 3), "heads": (nn.MultiHeadAttention, 2, D),
        "hops": (nn.MultiHopPooling, D, 2),
    }  # fmt: skip
    kind, *sizes = kinds[name]
    model: linen.Module = nnx.bridge.to_linen(kind, *sizes)
    variables = model.init(jax.random.key(0), x)
    came = jax.tree.leaves(model.apply(variables, x))
    assert variables["params"] and all(np.isfinite(leaf).all() for leaf in came)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kind(*sizes, rngs=nnx.Rngs(0))(x))]
    assert [leaf.shape for leaf in came] == shapes


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
