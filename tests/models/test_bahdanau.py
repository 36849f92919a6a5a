import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jattn.models.bahdanau import BahdanauTranslator, Config
from jattn.models.tokens import cross_entropy

CONFIG = Config(17, 13, embedding_features=3, hidden_features=5, num_layers=2)
B, S, T = 2, 7, 4
LENGTHS = np.array([4, 7])
# Logits are sums of small numbers through fewer than 40 dependent sums of at most 13 terms each.
TOLERANCE = 40 * 13 * np.finfo(np.float64).eps


def build(config=CONFIG, **options):
    return BahdanauTranslator(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


@nnx.jit
def force(model, source, target_in, lengths=None):
    return model(source, target_in, lengths=lengths, return_weights=True)


def data(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 17, (B, S)), rng.integers(0, 13, (B, T))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Oracle:
    """The model for one sentence in NumPy float64, step by step, as paper and PyTorch have it."""

    def __init__(self, model):
        state = nnx.state(model, nnx.Param)
        self.weights = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(state)
        )

    def gru(self, weights, x, states):
        after = []
        for layer, h in enumerate(states):
            own = weights["layers"][layer]
            inputs = x @ own["input_kernel"] + own["input_bias"]
            hidden = h @ own["hidden_kernel"] + own["hidden_bias"]
            (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(inputs, 3), np.split(hidden, 3)
            n = np.tanh(x_n + sigmoid(x_r + h_r) * h_n)
            z = sigmoid(x_z + h_z)
            x = (1 - z) * n + z * h
            after.append(x)
        return after

    def encode(self, source):
        weights = self.weights["encoder"]
        states, outputs = [np.zeros(5)] * 2, []
        for token in source:
            states = self.gru(weights["gru"], weights["embedding"]["embedding"][token], states)
            outputs.append(states[-1])
        return outputs, states

    def step(self, token, states, outputs):
        weights = self.weights["decoder"]
        attention = weights["attention"]
        scores = np.empty(len(outputs))
        for s, output in enumerate(outputs):
            hidden = np.tanh(
                states[-1] @ attention["query"]["kernel"] + output @ attention["key"]["kernel"]
            )
            scores[s] = hidden @ attention["weight"]
        alignment = np.exp(scores) / np.exp(scores).sum()
        context = sum(a * output for a, output in zip(alignment, outputs, strict=True))
        states = self.gru(
            weights["gru"],
            np.concatenate([context, weights["embedding"]["embedding"][token]]),
            states,
        )
        return states[-1] @ weights["out"]["kernel"] + weights["out"]["bias"], states, alignment

    def force(self, source, target_in):
        outputs, states = self.encode(source)
        logits, weights = [], []
        for token in target_in:
            row, states, alignment = self.step(token, states, outputs)
            logits.append(row)
            weights.append(np.pad(alignment, (0, S - len(source))))
        return np.array(logits), np.array(weights)

    def greedy(self, source, max_length):
        tokens = []
        while len(tokens) < max_length and CONFIG.end not in tokens:
            logits, _ = self.force(source, [CONFIG.start, *tokens])
            tokens.append(int(np.argmax(logits[-1])))
        return tokens

    def log_probability(self, source, tokens):
        logits, _ = self.force(source, [CONFIG.start, *tokens[:-1]])
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(row[token] for row, token in zip(log_p, tokens, strict=True))


def lively(model):
    """Larger output weights, so that what is decoded varies."""
    model.decoder.out.kernel[...] *= 20
    model.decoder.embedding.embedding[...] *= 5
    return model


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
def test_teacher_forcing_equals_a_loop(x64, lengths):
    model, (source, target_in) = build(), data()
    logits, weights = force(model, source, target_in, lengths)
    for example in range(B):
        real = source[example, : S if lengths is None else lengths[example]]
        expected = Oracle(model).force(real, target_in[example])
        np.testing.assert_allclose(logits[example], expected[0], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(weights[example], expected[1], rtol=0, atol=TOLERANCE)


def test_the_gradient_is_the_difference_of_the_loop(x64):
    """A central difference along one random direction.

    Its error is h² and eps / h, both near 1e-10 for h = 1e-5.
    """
    model, (source, target_in) = build(), data()
    graphdef, parameters = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(1)
    cotangent, h = rng.normal(size=(B, T, 13)), 1e-5
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), parameters)

    def moved(distance):
        step = jax.tree.map(lambda leaf, along: leaf + distance * along, parameters, direction)
        oracle = Oracle(nnx.merge(graphdef, step))
        return sum(
            np.sum(cotangent[b] * oracle.force(source[b, : LENGTHS[b]], target_in[b])[0])
            for b in range(B)
        )

    def total(parameters):
        return jnp.sum(
            cotangent * nnx.merge(graphdef, parameters)(source, target_in, lengths=LENGTHS)
        )

    gradient = jax.jit(jax.grad(total))(parameters)
    along = sum(
        jax.tree.leaves(jax.tree.map(lambda one, other: jnp.vdot(one, other), gradient, direction))
    )
    np.testing.assert_allclose(along, (moved(h) - moved(-h)) / (2 * h), rtol=1e-7)


def test_what_stands_in_the_padding_does_not_matter(x64):
    model, (source, target_in) = build(), data()
    other = np.where(np.arange(S) < LENGTHS[:, None], source, (source + 1) % 17)
    wider = np.pad(other, ((0, 0), (0, 3)))
    expected, weights = force(model, source, target_in, LENGTHS)
    np.testing.assert_array_equal(force(model, other, target_in, LENGTHS)[0], expected)
    np.testing.assert_allclose(
        force(model, wider, target_in, LENGTHS)[0], expected, rtol=0, atol=TOLERANCE
    )
    assert not weights[0, :, LENGTHS[0] :].any()
    as_text = [force(model, text, target_in)[0] for text in (source, other)]
    assert np.abs(as_text[0] - as_text[1]).max() > 1e-4


def test_stepping_equals_teacher_forcing(x64):
    model, (source, target_in) = build(), data()
    expected, _ = force(model, source, target_in, LENGTHS)
    outputs, state = model.encoder(source, lengths=LENGTHS)
    memory = model.decoder.remember(outputs, LENGTHS)
    step = jax.jit(lambda tokens, state: model.decoder.step(tokens, state, memory))
    for t in range(T):
        state, logits = step(target_in[:, t], state)
        np.testing.assert_allclose(logits, expected[:, t], rtol=0, atol=TOLERANCE)


def test_greedy_equals_a_loop(x64):
    model, (source, _) = lively(build()), data()
    found, weights = model.greedy(source, lengths=LENGTHS, max_length=11, return_weights=True)
    oracle, lengths = Oracle(model), []
    for example in range(B):
        real = source[example, : LENGTHS[example]]
        tokens = oracle.greedy(real, 11)
        lengths.append(len(tokens))
        assert found.tokens[example].tolist() == tokens + [CONFIG.pad] * (11 - len(tokens))
        expected = oracle.force(real, [CONFIG.start, *tokens[:-1]])[1]
        np.testing.assert_allclose(
            weights[example, : len(tokens)], expected, rtol=0, atol=TOLERANCE
        )
        assert not weights[example, len(tokens) :].any()
    assert found.lengths.tolist() == lengths
    chex.assert_trees_all_equal(model.greedy(source, lengths=LENGTHS, max_length=11), found)
    beam = model.beam(source, lengths=LENGTHS, max_length=11, width=1)
    np.testing.assert_array_equal(beam.tokens[:, 0], found.tokens)


def test_every_hypothesis_of_a_beam_scores_as_the_loop_says(x64):
    model, (source, _) = lively(build()), data()
    found, weights = model.beam(
        source, lengths=LENGTHS, max_length=5, width=3, length_penalty=0.7, return_weights=True
    )
    oracle = Oracle(model)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    for example, hypothesis in np.ndindex(B, 3):
        real, length = source[example, : LENGTHS[example]], found.lengths[example, hypothesis]
        tokens = found.tokens[example, hypothesis, :length].tolist()
        expected = oracle.log_probability(real, tokens) / ((5 + len(tokens)) / 6) ** 0.7
        # The logits, up to 100 in magnitude, enter at relative precision eps through a
        # well-conditioned log-sum-exp.
        np.testing.assert_allclose(
            found.scores[example, hypothesis], expected, rtol=0, atol=100 * TOLERANCE
        )
        expected = oracle.force(real, [CONFIG.start, *tokens[:-1]])[1]
        np.testing.assert_allclose(
            weights[example, hypothesis, :length], expected, rtol=0, atol=TOLERANCE
        )
        assert not weights[example, hypothesis, length:].any()


@pytest.mark.parametrize("layer", ["attention", "recurrent"])
def test_every_step_drops_other_units(layer):
    """Without dropout all steps are alike: equal inputs, and a state that remembers nothing."""
    model = BahdanauTranslator(dataclasses.replace(CONFIG, dropout_rate=0.5), rngs=nnx.Rngs(0))
    model.decoder.attention.query.kernel[...] *= 0
    for cell in model.decoder.gru.layers:
        cell.hidden_kernel[...] *= 0
        cell.input_kernel[...] *= 5
        cell.input_bias[5:10] = -60.0  # the update gate lets everything in
    if layer == "recurrent":
        model.decoder.attention.dropout.rate = 0.0
    else:
        model.decoder.gru.dropout.rate = 0.0
    source, target_in = data()[0], np.ones((B, 11), int)
    call = nnx.jit(
        lambda model, deterministic: model(source, target_in, deterministic=deterministic),
        static_argnums=1,
    )
    plain = call(model, True)
    np.testing.assert_allclose(plain, np.broadcast_to(plain[:, :1], plain.shape), rtol=0, atol=1e-5)
    dropped, again = call(model, False), call(model, False)
    # With S = 7 weights, or 5 units, dropped evenly, 11 steps can share some masks, but never all.
    steps = np.unique(np.round(dropped[0], 4), axis=0)
    assert len(steps) > 3
    assert np.abs(dropped - again).max() > 1e-3


def test_train_and_eval_switch_dropout_and_evaluation_draws_nothing():
    model = BahdanauTranslator(dataclasses.replace(CONFIG, dropout_rate=0.5), rngs=nnx.Rngs(0))
    source, target_in = data()
    model.eval()
    plain, _ = force(model, source, target_in)
    before = jax.tree.leaves(nnx.state(model, nnx.RngCount))
    closed_over = jax.jit(lambda source: model(source, target_in))(source)
    np.testing.assert_allclose(closed_over, plain, rtol=0, atol=40 * 13 * np.finfo(np.float32).eps)
    model.greedy(source, max_length=2)
    assert jax.tree.leaves(nnx.state(model, nnx.RngCount)) == before
    model.train()
    assert np.abs(force(model, source, target_in)[0] - plain).max() > 1e-4
    assert all(count == earlier + 1 for count, earlier in zip(
        jax.tree.leaves(nnx.state(model, nnx.RngCount)), before, strict=True
    ))  # fmt: skip


def test_jit_and_vmap_agree_with_the_batch(x64):
    model, (source, target_in) = build(), data()
    expected, _ = force(model, source, target_in, LENGTHS)

    def one(source, target_in, length):
        return model(source[None], target_in[None], lengths=length[None])[0]

    mapped = jax.jit(jax.vmap(one))(source, target_in, LENGTHS)
    np.testing.assert_allclose(mapped, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_it_learns_to_reverse():
    """Reversing needs the alignment: the last source token comes first."""
    config = Config(8, 8, embedding_features=16, hidden_features=32)
    model = BahdanauTranslator(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    rng = np.random.default_rng(0)

    @nnx.jit
    def train(model, optimizer, source, target):
        target_in = jnp.concatenate(
            [jnp.full((len(target), 1), config.start, target.dtype), target[:, :-1]], axis=1
        )
        loss, gradient = nnx.value_and_grad(
            lambda model: cross_entropy(model(source, target_in), target)
        )(model)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            optimizer.update(model, gradient)
        return loss

    def batch(size):
        source = rng.integers(3, 8, (size, 3))
        return source, np.concatenate([source[:, ::-1], np.full((size, 1), config.end)], axis=1)

    losses = [train(model, optimizer, *batch(64)) for _ in range(150)]
    source, target = batch(101)
    assert losses[-1] < losses[0] / 10
    assert (model.greedy(source, max_length=4).tokens == target).all(axis=1).mean() > 0.9


def test_bfloat16_runs():
    model, (source, target_in) = (
        BahdanauTranslator(CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        data(),
    )
    assert jax.eval_shape(lambda: model(source, target_in, lengths=LENGTHS)).dtype == jnp.bfloat16
    found = jax.eval_shape(lambda: model.greedy(source, lengths=LENGTHS, max_length=3))
    assert found.scores.dtype == jnp.float32


def test_loss_is_the_mean_over_real_tokens(x64, rng):
    logits, targets, lengths = (
        rng.normal(size=(3, 5, 7)),
        rng.integers(0, 7, (3, 5)),
        np.array([5, 0, 2]),
    )
    terms = [
        np.log(np.exp(logits[b, t]).sum()) - logits[b, t, targets[b, t]]
        for b in range(3)
        for t in range(lengths[b])
    ]
    eps = np.finfo(np.float64).eps
    np.testing.assert_allclose(
        cross_entropy(logits, targets, lengths=lengths), np.mean(terms), rtol=20 * eps
    )
    full = np.full(3, 5)
    np.testing.assert_allclose(
        cross_entropy(logits, targets), cross_entropy(logits, targets, lengths=full), rtol=20 * eps
    )
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets, lengths=lengths))(logits)
    assert not gradient[1].any() and not gradient[2, 2:].any() and gradient[2, :2].all()


@pytest.mark.parametrize("token", [-1, 7])
def test_an_unknown_target_that_jit_cannot_see_gives_no_number(token):
    assert np.isnan(jax.jit(cross_entropy)(jnp.zeros((1, 2, 7)), jnp.array([[1, token]])))


@pytest.mark.parametrize("token", [-1, 17])
def test_an_unknown_source_that_jit_cannot_see_gives_no_number(x64, token):
    model, (source, target_in) = build(), data()
    source[0, 0] = token
    logits = jax.jit(lambda source: model(source, target_in))(source)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "source must lie in 0 … 16", {"source": np.full((B, S), 17)}),
        (ValueError, "source must lie in 0 … 16", {"source": np.full((B, S), -1)}),
        (TypeError, "source must be integers", {"source": np.ones((B, S))}),
        (ValueError, "source must be", {"source": np.ones(S, int)}),
        (ValueError, "one step", {"source": np.ones((B, 0), int)}),
        (ValueError, "target_in must lie in 0 … 12", {"target_in": np.full((B, T), 13)}),
        (ValueError, "target_in must be", {"target_in": np.ones((B + 1, T), int)}),
        (TypeError, "target_in must be integers", {"target_in": np.ones((B, T))}),
        (ValueError, "lengths must lie in 1 … 7", {"lengths": np.array([0, 7])}),
        (ValueError, "lengths must lie in 1 … 7", {"lengths": np.array([3, 8])}),
        (ValueError, "lengths must be", {"lengths": np.array([3, 4, 5])}),
        (TypeError, "lengths must be integers", {"lengths": np.array([3.0, 4.0])}),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    model, (source, target_in) = BahdanauTranslator(CONFIG, rngs=nnx.Rngs(0)), data()
    options = {"source": source, "target_in": target_in, **arguments}
    with pytest.raises(error, match=message):
        model(**options)
    if "target_in" not in arguments:
        del options["target_in"]
        for search in (model.greedy, lambda **options: model.beam(**options, width=2)):
            with pytest.raises(error, match=message):
                search(**options, max_length=3)


def test_bad_searches_are_named():
    model, (source, _) = BahdanauTranslator(CONFIG, rngs=nnx.Rngs(0)), data()
    with pytest.raises(ValueError, match="max_length"):
        model.greedy(source, max_length=0)
    with pytest.raises(ValueError, match="width"):
        model.beam(source, max_length=3, width=0)


@pytest.mark.parametrize(
    "name", ["source_vocabulary", "hidden_features", "num_layers", "pad", "end", "dropout_rate"]
)
def test_bad_configs_are_named(name):
    with pytest.raises(ValueError, match=name):
        BahdanauTranslator(dataclasses.replace(CONFIG, **{name: -1}), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "targets must be", {"targets": np.ones((2, 4), int)}),
        (ValueError, "targets must lie in 0 … 6", {"targets": np.full((2, 3), 7)}),
        (TypeError, "targets must be integers", {"targets": np.ones((2, 3))}),
        (TypeError, "logits must be floating", {"logits": np.ones((2, 3, 7), int)}),
        (ValueError, "lengths must be", {"lengths": np.ones((2, 3), int)}),
        (ValueError, "lengths must lie in 0 … 3", {"lengths": np.array([1, 4])}),
    ],
)
def test_loss_names_bad_input(error, message, arguments):
    with pytest.raises(error, match=message):
        cross_entropy(
            **{
                "logits": np.ones((2, 3, 7), np.float32),
                "targets": np.ones((2, 3), int),
                **arguments,
            }
        )
