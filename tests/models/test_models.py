"""What all models have in common: compute dtype, attend=, dropout's switches, ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn.functional import compat
from jattn.models import bahdanau, char_rnn, classifier, luong
from jattn.models.decoding import beam_search, greedy
from jattn.models.tokens import cross_entropy

B, S, C = 4, 3, 5
LENGTHS = np.array([1, 3, 2, 3])
SOURCE = np.array([[3, 0, 0], [1, 2, 3], [4, 1, 0], [2, 2, 4]])
NETWORK = char_rnn.Config(C, 3, 2, 1)
SORTED = classifier.Config(C, C, 3, 2, dropout_rate=0.5)
MODELS = {
    "bahdanau": (
        bahdanau.BahdanauTranslator,
        bahdanau.Config(C, C, 3, 2, num_layers=2, dropout_rate=0.5),
    ),
    "luong": (luong.LuongTranslator, luong.Config(C, C, 3, 2, dropout_rate=0.5)),
    "luong prediction": (
        luong.LuongTranslator,
        luong.Config(C, C, 3, 2, feed="prediction", reverse_source=True),
    ),
    "classifier": (
        classifier.Classifier,
        classifier.Config(C, C, 3, 2, dropout_rate=0.5, pooling=jattn.nn.LearnedQueryPooling),
    ),
    "last step": (
        classifier.Classifier,
        classifier.Config(C, C, 3, 2, pooling=classifier.LastStep),
    ),
    "cell": (char_rnn.CharCell, NETWORK),
    "characters": (char_rnn.EmbeddedCharRNN, NETWORK),
}
NETWORKS = ["cell", "characters"]
TRANSLATORS = ["bahdanau", "luong", "luong prediction"]
every_model = pytest.mark.parametrize("name", MODELS)


def build(name, **options):
    kind, config = MODELS[name]
    return kind(config, rngs=nnx.Rngs(0), **options)


def call(name, model, tokens, lengths, **options):
    if name in TRANSLATORS:
        return model(tokens, tokens, lengths=lengths, **options)
    return model(tokens) if name in NETWORKS else model(tokens, lengths=lengths, **options)


def loss(name, model, tokens, lengths):
    logits = call(name, model, tokens, lengths)
    if logits.ndim == 2:
        logits, tokens = logits[:, None], tokens[:, :1]
    return cross_entropy(logits, tokens)


def assert_close(came, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        came,
        expected,
    )


def mesh_of(kind):
    return jax.make_mesh((2,), ("batch",), axis_types=(kind,))


@pytest.mark.parametrize("search", [greedy, functools.partial(beam_search, width=2)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_search_whose_step_alone_differs_between_devices(search, kind):
    """Carry and start are the same everywhere; the step closes over what is not."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(B, C)), jnp.float32)

    def decode(logits):
        start = (
            jnp.zeros_like(logits[:, 0], jnp.int32)
            if kind == AxisType.Explicit
            else (jnp.zeros(len(logits), jnp.int32))
        )
        return search(
            lambda carry, tokens: (carry, logits + 0.1 * tokens[:, None].astype(jnp.float32)),
            (), start=start, end=0, max_length=3,
        )  # fmt: skip

    expected, mesh = decode(logits), mesh_of(kind)
    if kind == AxisType.Auto:
        came = jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")))(
            logits
        )
    else:
        with jax.set_mesh(mesh):
            came = jax.jit(decode)(jax.device_put(logits, NamedSharding(mesh, P("batch"))))
    assert_close(came, expected)


@pytest.mark.parametrize("part", ["attention", "gru"])
def test_each_dropout_of_a_decoder_follows_its_own_switch(part):
    model = build("bahdanau")
    model.eval()
    off, weights = call("bahdanau", model, SOURCE, LENGTHS, return_weights=True)
    getattr(model.decoder, part).train()
    on, changed = call("bahdanau", model, SOURCE, LENGTHS, return_weights=True)
    assert np.abs(on - off).max() > 1e-3
    assert_close(changed[:, 0], weights[:, 0])  # before anything is dropped
    assert_close(call("bahdanau", model, SOURCE, LENGTHS, deterministic=True), off)


@every_model
def test_dtype_to_compute_in(name):
    model = build(name, dtype=jnp.bfloat16)
    model.eval()
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {str(leaf.dtype) for leaf in parameters} == {"float32"}
    run = functools.partial(call, name, model)
    products = {
        str(equation.invars[0].aval.dtype)
        for equation in compat.equations(jax.make_jaxpr(run)(SOURCE, LENGTHS).jaxpr)
        if equation.primitive.name == "dot_general"
    }
    assert products == {"bfloat16"} and jax.eval_shape(run, SOURCE, LENGTHS).dtype == jnp.bfloat16
    mean = jax.eval_shape(functools.partial(loss, name, model), SOURCE, LENGTHS)
    assert mean.dtype == jnp.float32


def test_attend_sets_the_kernel():
    for name in ("bahdanau", "luong", "classifier"):
        model = build(name, attend=functools.partial(jattn.attend, implementation="blockwise"))
        expected = build(name)
        options = {"deterministic": True}
        assert_close(
            call(name, model, SOURCE, LENGTHS, **options),
            call(name, expected, SOURCE, LENGTHS, **options),
        )
        if name in TRANSLATORS:
            assert model.greedy(SOURCE, max_length=2).tokens.shape == (B, 2)
    with pytest.raises(ValueError, match="attend needs a pooling in the config"):
        classifier.Classifier(SORTED, attend=jattn.attend, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"attend needs a pooling that takes it, got .*LastStep"):
        build("last step", attend=jattn.attend)


@pytest.mark.parametrize("name", TRANSLATORS)
def test_what_a_decoder_remembers_is_named(name):
    decoder = build(name).decoder
    width = decoder.memory_features
    outputs = jnp.ones((B, S, width))
    wrong = {
        f"outputs must be \\[..., length, {width}\\]": (outputs[..., :1], LENGTHS),
        "outputs must be \\[B, S, width\\]": (outputs[0], LENGTHS),
        "outputs must be floating": (outputs.astype(int), LENGTHS),
        "lengths must be": (outputs, LENGTHS[:2]),
        "lengths must lie in 1 … 3": (outputs, LENGTHS - 1),
    }
    for message, arguments in wrong.items():
        with pytest.raises((ValueError, TypeError), match=message):
            decoder.remember(*arguments)


def test_a_translator_without_attention_on_a_mesh_that_is_not_set():
    model = luong.LuongTranslator(luong.Config.plain(C, C), rngs=nnx.Rngs(0))
    expected = model(SOURCE, SOURCE, lengths=LENGTHS)
    mesh = mesh_of(AxisType.Explicit)
    nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
    rows = NamedSharding(mesh, P("batch"))
    source, lengths = jax.device_put((SOURCE, LENGTHS), rows)
    assert_close(model(source, source, lengths=lengths), expected)


def test_a_vocabulary_of_one_and_ids_beyond_int32(x64):
    """An unknown id is refused, and where its value is unknown its row is NaN."""
    model = classifier.Classifier(classifier.Config(1, 2, 3, 2), rngs=nnx.Rngs(0))
    translator = luong.LuongTranslator(luong.Config(1, C, 3, 2), rngs=nnx.Rngs(0))
    for token in (1, 2**32):
        ids = np.array([[0, token]])
        with pytest.raises(ValueError, match="must lie in 0 … 0"):
            model(ids)
        assert np.isnan(jax.jit(model)(ids)).all()
        with pytest.raises(ValueError, match="source must lie in 0 … 0"):
            translator(ids, ids * 0)
        assert np.isnan(jax.jit(translator)(ids, ids * 0)).all()
