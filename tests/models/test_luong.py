"""The searches, and what a fixture cannot show; fixtures prove teacher forcing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models.luong import Config, LuongTranslator

CONFIG = Config(17, 13, embedding_features=3, hidden_features=5)
B, S, T = 2, 7, 4
LENGTHS = np.array([4, 7])
# Logits are sums of small numbers through fewer than 40 dependent sums of at most 15 terms each.
TOLERANCE = 40 * 15 * np.finfo(np.float64).eps

FORMS = {
    "output": {},
    "prediction": {"feed": "prediction"},
    "no_attention": {"attention": False},
}


def build(dtype=jnp.float64, **form):
    return LuongTranslator(dataclasses.replace(CONFIG, **form), param_dtype=dtype, rngs=nnx.Rngs(0))


def data(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 17, (B, S)), rng.integers(0, 13, (B, T))


@nnx.jit
def force(model, source, target_in, lengths=None):
    return model(source, target_in, lengths=lengths, return_weights=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


class Oracle:
    """The model for one sentence, in NumPy float64, step by step."""

    def __init__(self, model):
        state = nnx.state(model, nnx.Param)
        weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(state))
        self.config, self.encoder, self.decoder = (
            model.config,
            weights["encoder"],
            weights["decoder"],
        )

    def lstm(self, cell, x, h, c):
        gates = (
            x @ cell["input_kernel"]
            + cell["input_bias"]
            + h @ cell["hidden_kernel"]
            + cell["hidden_bias"]
        )
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    def encode(self, source):
        """Outputs of the two directions side by side, and the decoder's first h and c."""
        both, ends = [], []
        for layers, order in (("layers", 1), ("backward_layers", -1)):
            h, c, outputs = np.zeros(5), np.zeros(5), []
            for token in source[::order]:
                h, c = self.lstm(
                    self.encoder["lstm"][layers][0],
                    self.encoder["embedding"]["embedding"][token],
                    h,
                    c,
                )
                outputs.append(h)
            both.append(outputs[::order])
            ends.append((h, c))
        h, c = (np.concatenate(parts) for parts in zip(*ends, strict=True))
        return (
            np.concatenate(both, axis=1),
            h @ self.decoder["first_h"]["kernel"],
            c @ self.decoder["first_c"]["kernel"],
        )

    def force(self, source, target_in):
        config, weights = self.config, self.decoder
        embedding = weights["embedding"]["embedding"]
        memory, h, c = self.encode(source)
        output, prediction, logits, alignments = np.zeros(5), config.start, [], []
        for token in target_in:
            if config.feed == "prediction":
                parts = [embedding[prediction], embedding[token]]
            else:
                parts = [embedding[token], *([output] if config.attention else [])]
            h, c = self.lstm(weights["cell"], np.concatenate(parts), h, c)
            output = h
            if config.attention:
                alignments.append(
                    softmax(np.array([h @ weights["attention"]["weight"] @ row for row in memory]))
                )
                output = np.tanh(
                    np.concatenate([alignments[-1] @ memory, h]) @ weights["combine"]["kernel"]
                )
            logits.append(output @ weights["out"]["kernel"])
            prediction = int(np.argmax(logits[-1]))
        return np.array(logits), np.array(alignments)

    def greedy(self, source, max_length):
        tokens = []
        while len(tokens) < max_length and self.config.end not in tokens:
            logits, _ = self.force(source, [self.config.start, *tokens])
            tokens.append(int(np.argmax(logits[-1])))
        return tokens

    def log_probability(self, source, tokens):
        logits, _ = self.force(source, [self.config.start, *tokens[:-1]])
        return sum(np.log(softmax(row)[token]) for row, token in zip(logits, tokens, strict=True))


def lively(model):
    """Larger output weights, so that what is decoded varies."""
    model.decoder.out.kernel[...] *= 20
    model.decoder.embedding.embedding[...] *= 5
    return model


@pytest.mark.parametrize("form", FORMS)
def test_greedy_equals_a_loop(x64, form):
    model, (source, _) = lively(build(**FORMS[form])), data()
    options = {"lengths": LENGTHS, "max_length": 7}
    found, weights = (
        model.greedy(source, **options, return_weights=True)
        if model.config.attention
        else (model.greedy(source, **options), None)
    )
    oracle = Oracle(model)
    for example in range(B):
        real = source[example, : LENGTHS[example]]
        tokens = oracle.greedy(real, 7)
        assert found.tokens[example].tolist() == tokens + [CONFIG.pad] * (7 - len(tokens))
        assert found.lengths[example] == len(tokens)
        if weights is not None:
            expected = oracle.force(real, [CONFIG.start, *tokens[:-1]])[1]
            np.testing.assert_allclose(
                weights[example, : len(tokens), : len(real)], expected, rtol=0, atol=TOLERANCE
            )
            assert (
                not weights[example, len(tokens) :].any()
                and not weights[example, :, len(real) :].any()
            )


def test_every_hypothesis_of_a_beam_scores_as_the_loop_says(x64):
    """Each carries its own prediction, which need not be the token that it took."""
    model, (source, _) = lively(build(feed="prediction")), data()
    found, weights = model.beam(
        source, lengths=LENGTHS, max_length=5, width=3, length_penalty=0.7, return_weights=True
    )
    oracle, strayed = Oracle(model), False
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
        logits, expected = oracle.force(real, [CONFIG.start, *tokens[:-1]])
        shown = weights[example, hypothesis, :length, : len(real)]
        np.testing.assert_allclose(shown, expected, rtol=0, atol=TOLERANCE)
        strayed |= logits[:-1].argmax(axis=1).tolist() != tokens[:-1]
    assert strayed


def test_a_source_is_reversed_within_its_length(x64):
    """Weights stand in the order of the source as it came."""
    source, target_in = data()
    by_hand = np.array(
        [[*row[:length][::-1], *row[length:]] for row, length in zip(source, LENGTHS, strict=True)]
    )
    found, weights = force(build(reverse_source=True), source, target_in, LENGTHS)
    expected, turned = force(build(), by_hand, target_in, LENGTHS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    for example, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            weights[example, :, :length], turned[example, :, :length][:, ::-1], atol=TOLERANCE
        )
    assert np.abs(found - force(build(), source, target_in, LENGTHS)[0]).max() > 1e-3


def test_what_stands_in_the_padding_does_not_matter(x64):
    source, target_in = data()
    other = np.where(np.arange(S) < LENGTHS[:, None], source, (source + 1) % 17)
    model = build(reverse_source=True)
    expected, _ = force(model, source, target_in, LENGTHS)
    np.testing.assert_array_equal(force(model, other, target_in, LENGTHS)[0], expected)


def test_every_step_drops_other_units():
    """Without dropout all steps are alike: equal inputs, and a state that remembers nothing."""
    model = build(jnp.float32, attention=False, dropout_rate=0.5)
    model.decoder.cell.hidden_kernel[...] *= 0
    model.decoder.cell.input_bias[5:10] = -60.0  # the forget gate lets nothing through
    source, target_in = data()[0], np.ones((B, 11), int)
    call = nnx.jit(
        lambda model, deterministic: model(source, target_in, deterministic=deterministic),
        static_argnums=1,
    )
    plain, dropped, again = call(model, True), call(model, False), call(model, False)
    np.testing.assert_allclose(plain, np.broadcast_to(plain[:, :1], plain.shape), rtol=0, atol=1e-5)
    # With 5 units dropped evenly, 11 steps can share some masks, but never all.
    assert len(np.unique(np.round(dropped[0], 4), axis=0)) > 3
    assert np.abs(dropped - again).max() > 1e-3


@pytest.mark.parametrize("token", [-1, 17])
def test_an_unknown_source_that_jit_cannot_see_gives_no_number(x64, token):
    model, (source, target_in) = build(feed="prediction"), data()
    source[0, 0] = token
    logits, _ = force(model, source, target_in)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


def test_bfloat16_runs():
    model, (source, target_in) = build(jnp.bfloat16), data()
    assert jax.eval_shape(lambda: model(source, target_in, lengths=LENGTHS)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "source must lie in 0 … 16", {"source": np.full((B, S), 17)}),
        (TypeError, "source must be integers", {"source": np.ones((B, S))}),
        (ValueError, "one step", {"source": np.ones((B, 0), int)}),
        (ValueError, "target_in must lie in 0 … 12", {"target_in": np.full((B, T), 13)}),
        (ValueError, "target_in must be", {"target_in": np.ones((B + 1, T), int)}),
        (ValueError, "lengths must lie in 1 … 7", {"lengths": np.array([0, 7])}),
        (TypeError, "lengths must be integers", {"lengths": np.array([3.0, 4.0])}),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    model, (source, target_in) = build(jnp.float32, reverse_source=True), data()
    with pytest.raises(error, match=message):
        model(**{"source": source, "target_in": target_in, **arguments})


def test_there_are_no_weights_without_attention():
    model, (source, target_in) = build(jnp.float32, attention=False), data()
    message = "return_weights=True needs attention=True"
    with pytest.raises(ValueError, match=message):
        model(source, target_in, return_weights=True)
    with pytest.raises(ValueError, match=message):
        model.greedy(source, max_length=2, return_weights=True)


@pytest.mark.parametrize(
    "name", ["source_vocabulary", "hidden_features", "pad", "end", "dropout_rate", "feed"]
)
def test_bad_configs_are_named(name):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(CONFIG, **{name: -1})
