"""The Transformer that translates, and the encoder of features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models import FeatureClassifier, TransformerTranslator, feature_encoder, transformer
from jattn.models.decoding import beam_search, greedy

B, S, T, L = 3, 6, 4, 5
CONFIG = transformer.Config(13, 11, 12, 3, 2, 2, 16, dropout_rate=0.3)
SOURCE = np.array([[3, 1, 12, 4, 0, 0], [7, 7, 2, 9, 11, 5], [1, 0, 0, 0, 0, 0]])
TARGET = np.array([[1, 10, 2, 9], [1, 5, 5, 8], [1, 8, 0, 0]])
LENGTHS = np.array([4, 6, 1])


def make(**options):
    model = TransformerTranslator(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(1))
    model.eval()
    return model


FORMS = {"post-norm": {}, "pre-norm": {"norm_first": True}, "tied": {"tied": True}}
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


@every_form
def test_stepping_equals_teacher_forcing(options):
    model = make(**options)
    expected = model(SOURCE, TARGET, lengths=LENGTHS)
    memory, state = model._read(SOURCE, LENGTHS, True)
    state = model._begin(state, jnp.asarray(SOURCE), T)
    for t in range(T):
        state, logits = model.decoder.step(TARGET[:, t], state, memory)
        np.testing.assert_allclose(logits, expected[:, t], rtol=1e-5, atol=1e-5)


def step_anew(model, source, lengths):
    """A step that reads all tokens so far again, without a cache."""

    def step(carry, tokens):
        written, time = carry
        here = jnp.arange(L) == time[:, None]
        written = jnp.where(here, tokens[:, None], written)
        logits = model(source, written, lengths=lengths)
        return (written, time + 1), logits[jnp.arange(len(tokens)), time]

    B = len(source)
    return step, (jnp.zeros((B, L), jnp.int32), jnp.zeros(B, jnp.int32))


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_search_with_caches_is_the_search_without(search):
    model, config = make(tied=True), CONFIG
    step, carry = step_anew(model, jnp.asarray(SOURCE), jnp.asarray(LENGTHS))
    options = {"max_length": L} | ({"width": 3} if search == "beam" else {})
    expected = (beam_search if search == "beam" else greedy)(
        step, carry, start=jnp.full(B, config.start), end=config.end, pad=config.pad, **options
    )
    found = getattr(model, search)(SOURCE, lengths=LENGTHS, **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_weights_are_those_of_teacher_forcing_and_end_with_the_text():
    model = make()
    found, weights = model.greedy(SOURCE, lengths=LENGTHS, max_length=L, return_weights=True)
    assert weights.shape == (B, L, S)
    target_in = np.concatenate([np.full((B, 1), CONFIG.start), found.tokens[:, :-1]], axis=1)
    _, expected = model(SOURCE, target_in, lengths=LENGTHS, return_weights=True)
    real = np.arange(L) < np.asarray(found.lengths)[:, None]
    np.testing.assert_allclose(weights[real], expected[real], rtol=1e-5, atol=1e-6)
    assert not weights[~real].any()
    assert not weights[0, :, 4:].any()


def test_what_stands_in_the_padding_does_not_matter():
    model = make()
    dirty = np.where(np.arange(S) < LENGTHS[:, None], SOURCE, 5)
    np.testing.assert_allclose(
        model(dirty, TARGET, lengths=LENGTHS), model(SOURCE, TARGET, lengths=LENGTHS), rtol=1e-6
    )


@pytest.mark.parametrize("length", [0, -1, S + 1])
def test_a_wrong_length_is_refused_and_under_jit_nan(length):
    model, lengths = make(), np.array([4, length, 1])
    with pytest.raises(ValueError, match="lengths must lie in 1 … 6"):
        model(SOURCE, TARGET, lengths=lengths)
    with pytest.raises(ValueError, match="lengths must lie in 1 … 6"):
        model.encoder(SOURCE, lengths=lengths)
    logits = jax.jit(lambda lengths: model(SOURCE, TARGET, lengths=lengths))(lengths)
    assert np.isnan(logits[1]).all() and np.isfinite(logits[::2]).all()


def test_no_step_sees_a_later_token():
    model = make()
    changed = TARGET.copy()
    changed[:, -1] = 3
    before, after = (model(SOURCE, each)[:, :-1] for each in (TARGET, changed))
    np.testing.assert_allclose(before, after, rtol=1e-6)


def test_dropout_is_drawn_anew_and_off_in_evaluation():
    model = make()
    model.train()
    first, second = (model(SOURCE, TARGET) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    off = [model(SOURCE, TARGET, deterministic=True) for _ in range(2)]
    np.testing.assert_array_equal(*off)


@pytest.mark.slow
def test_a_tied_table_has_one_parameter_and_gradients_from_both_sides():
    model = make(tied=True)
    assert model.decoder.out is None

    def loss(model):
        return model(SOURCE, TARGET).sum()

    gradient = nnx.grad(loss)(model)["decoder"]["embedding"]["embedding"]
    assert gradient.shape == (11, 12)
    assert np.abs(gradient[np.setdiff1d(np.arange(11), TARGET)]).max() > 1e-3  # by the logits alone


def test_a_token_beyond_the_caches_is_refused():
    model = make()
    memory, _ = model._read(SOURCE, LENGTHS, True)
    state = model.decoder.stack.empty_cache(B, 1)
    state, _ = model.decoder.step(TARGET[:, 0], state, memory)
    with pytest.raises(ValueError, match="length of the cache"):
        model.decoder.step(TARGET[:, 1], state, memory)


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="num_heads must be"):
        transformer.Config(3, 3, num_heads=0)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        make(num_heads=5)
    with pytest.raises(ValueError, match="their number must be even"):
        make(features=9)
    with pytest.raises(ValueError, match="max_length must be"):
        make().greedy(SOURCE, max_length=0)
    with pytest.raises(ValueError, match="classes must be"):
        FeatureClassifier(feature_encoder.Config(3), 0, rngs=nnx.Rngs(0))


FEATURES = feature_encoder.Config(5, 12, 3, 2, 16, dropout_rate=0.0)


def test_padded_steps_change_no_class(rng):
    model = FeatureClassifier(FEATURES, 4, rngs=nnx.Rngs(0))
    x = rng.normal(size=(2, 6, 5)).astype(np.float32)
    lengths = np.array([3, 6])
    expected = model(x[:1, :3])
    dirty = np.where(np.arange(6)[:, None] < lengths[:, None, None], x, np.float32(7))
    np.testing.assert_allclose(model(dirty, lengths=lengths)[:1], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(jax.jit(model)(x, lengths=np.array([0, 6]))).all()


@pytest.mark.parametrize("length", [-1, 7])
def test_a_wrong_number_of_steps_is_refused_and_under_jit_nan(length):
    model, x = FeatureClassifier(FEATURES, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 6, 5))
    with pytest.raises(ValueError, match="lengths must lie in 0 … 6"):
        model(x, lengths=np.array([3, length]))
    logits = jax.jit(lambda lengths: model(x, lengths=lengths))(np.array([3, length]))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()
    with pytest.raises(ValueError, match="lengths must be"):
        model(x, lengths=np.ones((2, 6), int))


def test_an_odd_width_needs_a_model_without_positions():
    config = dataclasses.replace(FEATURES, features=9, positions=False)
    assert FeatureClassifier(config, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 6, 5))).shape == (2, 4)
    with pytest.raises(ValueError, match="their number must be even"):
        FeatureClassifier(dataclasses.replace(config, positions=True), 4, rngs=nnx.Rngs(0))


def test_without_positions_the_order_of_steps_has_no_meaning(rng):
    x = rng.normal(size=(1, 6, 5)).astype(np.float32)
    for positions in (True, False):
        config = dataclasses.replace(FEATURES, positions=positions)
        model = FeatureClassifier(config, 4, rngs=nnx.Rngs(0))
        assert np.allclose(model(x), model(x[:, ::-1]), atol=1e-5) != positions
