import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models.classifier import Classifier, Config, LastStep
from jattn.nn import GRU, LSTM, RNN, FeaturePooling, LearnedQueryPooling, MultiHopPooling

B, T, C, D, F, IDS = 3, 7, 2, 5, 11, 13
LENGTHS = np.array([4, 7, 1])
TWO_WAYS = Config(IDS, C, D, F, bidirectional=True, network=RNN, pooling=LearnedQueryPooling)
ONE_RNN = Config(IDS, C, D, F, bidirectional=True, network=RNN)


def build(config=TWO_WAYS):
    return Classifier(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


@functools.partial(nnx.jit, static_argnames=("return_weights", "deterministic"))
def run(model, ids, lengths=None, **options):
    return model(ids, lengths=lengths, **options)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(1, IDS, (B, T))


def oracle(model, ids):
    """Forward and backward states of a plain recurrent network over a sentence, by a NumPy loop."""
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    states = []
    for name, order in (("layers", ids), ("backward_layers", ids[::-1])):
        own, h, run = weights["network"][name][0], np.zeros(F), []
        for token in order:
            x = weights["embedding"]["embedding"][token] @ own["input_kernel"] + own["input_bias"]
            h = np.tanh(x + h @ own["hidden_kernel"] + own["hidden_bias"])
            run.append(h)
        states.append(run)
    return np.array(states[0]), np.array(states[1][::-1]), weights


def score(weights, context):
    return context @ weights["out"]["kernel"] + weights["out"]["bias"]


def test_without_a_pooling_both_directions_give_their_ends(x64):
    model, ids = build(ONE_RNN), tokens()
    found = run(model, ids, LENGTHS)
    for row, length, logits in zip(ids, LENGTHS, found, strict=True):
        forward, backward, weights = oracle(model, row[:length])
        expected = score(weights, np.concatenate([forward[-1], backward[0]]))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)


def test_the_last_step_has_read_one_token_backwards(x64):
    config = Config(IDS, C, D, F, bidirectional=True, network=RNN, pooling=LastStep)
    model, ids = build(config), tokens()
    for lengths, ends in ((LENGTHS, LENGTHS), (None, [T] * B)):
        found, weights = run(model, ids, lengths, return_weights=True)
        np.testing.assert_array_equal(weights, np.eye(T)[np.array(ends) - 1])
        for row, end, logits in zip(ids, ends, found, strict=True):
            forward, backward, own = oracle(model, row[:end])
            expected = score(own, np.concatenate([forward[-1], backward[-1]]))
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)


def test_a_learned_query_weighs_the_steps(x64):
    model, ids = build(TWO_WAYS), tokens()
    found, weights = run(model, ids, LENGTHS, return_weights=True)
    assert weights.shape == (B, T)
    for row, length, logits, weight in zip(ids, LENGTHS, found, weights, strict=True):
        forward, backward, own = oracle(model, row[:length])
        h, pooling = np.concatenate([forward, backward], axis=1), own["pooling"]
        scores = np.exp(
            np.tanh(h @ pooling["key"]["kernel"] + pooling["key"]["bias"]) @ pooling["query"]
        )
        np.testing.assert_allclose(weight[:length], scores / scores.sum(), rtol=0, atol=1e-12)
        assert not np.any(weight[length:])
        np.testing.assert_allclose(
            logits, score(own, scores @ h / scores.sum()), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("network", [RNN, LSTM, GRU])
def test_in_one_direction_the_end_is_the_last_step(x64, network):
    end = Config(IDS, C, D, F, network=network)
    last = Config(IDS, C, D, F, network=network, pooling=LastStep)
    np.testing.assert_array_equal(
        run(build(end), tokens(), LENGTHS), run(build(last), tokens(), LENGTHS)
    )


@pytest.mark.parametrize("pooling", [None, LastStep, FeaturePooling, LearnedQueryPooling])
def test_padding_reaches_nothing(x64, pooling):
    config = Config(IDS, C, D, F, bidirectional=True, network=GRU, pooling=pooling)
    model = build(config)

    @nnx.jit
    def gradient(model, ids):
        return nnx.value_and_grad(lambda model: model(ids, lengths=LENGTHS).sum())(model)

    inside = np.arange(T) < LENGTHS[:, None]
    one, other = (gradient(model, np.where(inside, tokens(), filler)) for filler in (0, tokens(1)))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_feature_pooling_has_weights_for_each_feature(x64):
    config = Config(IDS, C, D, F, bidirectional=True, network=RNN, pooling=FeaturePooling)
    _, weights = run(build(config), tokens(), LENGTHS, return_weights=True)
    assert weights.shape == (B, T, 2 * F)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)


def test_any_leading_axes(x64):
    model = build(Config(IDS, C, D, F, network=RNN, pooling=LearnedQueryPooling))
    batch = run(model, tokens(), LENGTHS)
    np.testing.assert_allclose(
        run(model, tokens()[None], LENGTHS[None])[0], batch, rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(run(model, tokens()[0], LENGTHS[0]), batch[0], rtol=0, atol=1e-12)


def test_traced_values_that_do_not_fit_are_nan():
    model = Classifier(Config(IDS, C, D, F, network=RNN, pooling=LastStep), rngs=nnx.Rngs(0))
    found = run(model, np.where(np.arange(B)[:, None] == 2, IDS, tokens()), np.array([0, T, T]))
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), [True, False, True])
    assert np.isnan(run(model, tokens(), np.array([T + 1, T, 1]))[0]).all()


def test_dropout():
    """One layer: what is dropped are embedded tokens and the vector that is classified."""
    model = Classifier(Config(IDS, C, D, F, dropout_rate=0.5), rngs=nnx.Rngs(0))
    off = run(model, tokens(), deterministic=True)
    assert np.any(run(model, tokens()) != run(model, tokens()))
    model.eval()
    np.testing.assert_array_equal(run(model, tokens()), off)
    model.dropout.rate = 1.0
    model.train()
    np.testing.assert_array_equal(run(model, tokens()), np.broadcast_to(model.out.bias, (B, C)))


def test_a_pooling_of_ones_own(x64):
    config = Config(IDS, C, D, F, pooling=functools.partial(LearnedQueryPooling, hidden_features=3))
    assert build(config).pooling.query.shape == (3,)


def test_a_pooling_must_give_one_vector(x64):
    config = Config(IDS, C, D, F, pooling=functools.partial(MultiHopPooling, num_hops=2))
    with pytest.raises(ValueError, match=r"context must be \[..., F\].*got shape \(3, 2, 11\)"):
        jax.eval_shape(lambda: build(config)(tokens()))


@pytest.mark.parametrize(
    ("error", "message", "ids", "options"),
    [
        (ValueError, "tokens must lie in 0 … 12", tokens() + 7, {}),
        (TypeError, "tokens must be integers", tokens() + 0.5, {}),
        (ValueError, "tokens must be", np.int32(3), {}),
        (ValueError, "lengths must lie in 1 … 7", tokens(), {"lengths": np.array([0, 1, 1])}),
        (ValueError, "lengths must lie in 1 … 7", tokens(), {"lengths": np.array([8, 1, 1])}),
        (ValueError, "lengths must be", tokens(), {"lengths": np.array([1, 1])}),
        (TypeError, "lengths must be integers", tokens(), {"lengths": np.array([1.0, 1.0, 1.0])}),
    ],
)
def test_bad_calls_are_named(x64, error, message, ids, options):
    with pytest.raises(error, match=message):
        build()(ids, **options)


def test_weights_of_a_model_that_has_none(x64):
    with pytest.raises(ValueError, match="return_weights needs a config with a pooling"):
        build(ONE_RNN)(tokens(), return_weights=True)


def test_a_length_of_the_last_step(x64):
    with pytest.raises(ValueError, match="lengths must lie in 1 … 3"):
        LastStep(2, rngs=nnx.Rngs(0))(np.ones((1, 3, 2)), lengths=np.array([0]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocabulary", 0),
        ("classes", -1),
        ("num_layers", 0),
        ("dropout_rate", 2.0),
        ("padding_idx", IDS),
    ],
)
def test_bad_sizes_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Config(**{"vocabulary": IDS, "classes": C, name: value})


def test_presets():
    plain, attention = Config.plain(IDS, C), Config.attention(IDS, C)
    assert (plain.network, plain.pooling, plain.bidirectional) == (RNN, None, False)
    assert (attention.network, attention.pooling, attention.bidirectional) == (
        LSTM,
        LearnedQueryPooling,
        True,
    )
