import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models.decoding import beam_search, greedy

B, C, L, END = 3, 5, 4, 2
START = np.array([0, 1, 4])


def tables(seed=0):
    """Logits of a chain whose next token depends on example, time and the two tokens before."""
    return np.random.default_rng(seed).normal(size=(B, L, C, C, C)).astype(np.float32) * 2


def chain(tables):
    """The chain as a step. Its carry holds the table, the time and the token before the last."""
    carry = (jnp.asarray(tables), jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32))

    def step(carry, last):
        table, time, before = carry
        logits = jax.vmap(lambda table, *index: table[index])(table, time, before, last)
        return (table, time + 1, last), logits

    return step, carry


class Oracle:
    """The same chain in NumPy float64, and its searches over lists of tokens."""

    def __init__(self, tables, example):
        logits = tables[example].astype(np.float64)
        self.log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.start = int(START[example])

    def next(self, tokens):
        before, last = ((0, self.start, *tokens))[-2:]
        return self.log_p[len(tokens), before, last]

    def log_probability(self, tokens):
        return sum(self.next(tokens[:t])[token] for t, token in enumerate(tokens))

    def score(self, tokens, alpha):
        return self.log_probability(tokens) / ((5 + len(tokens)) / 6) ** alpha

    def everything(self, alpha, max_length):
        for length in range(1, max_length + 1):
            for tokens in itertools.product(range(C), repeat=length):
                if END not in tokens[:-1] and (length == max_length or tokens[-1] == END):
                    yield self.score(tokens, alpha), tokens

    def greedy(self):
        tokens = ()
        while len(tokens) < L and END not in tokens:
            tokens += (int(np.argmax(self.next(tokens))),)
        return tokens

    def beam(self, width, alpha):
        """The definition, run to the last step: no early stop."""
        living, complete = [()], []
        for time in range(1, L + 1):
            extended = [(*tokens, token) for tokens in living for token in range(C)]
            extended.sort(key=self.log_probability, reverse=True)
            complete += [tokens for tokens in extended[:width] if tokens[-1] == END or time == L]
            living = [tokens for tokens in extended if tokens[-1] != END][:width]
        complete.sort(key=lambda tokens: self.score(tokens, alpha), reverse=True)
        return complete[:width]


def sequences(decoded, example):
    rows = zip(
        np.asarray(decoded.tokens[example]), np.asarray(decoded.lengths[example]), strict=True
    )
    return [tuple(tokens[:length].tolist()) for tokens, length in rows]


search = jax.jit(
    lambda carry, **options: beam_search(
        chain(tables())[0], carry, start=START, end=END, **options
    ),
    static_argnames=("max_length", "width", "length_penalty", "pad"),
)
follow = jax.jit(
    lambda carry, **options: greedy(chain(tables())[0], carry, start=START, end=END, **options),
    static_argnames=("max_length", "pad"),
)
# A score is a sum of at most L float32 log-probabilities, each a difference of numbers below 32 in
# magnitude.
TOLERANCE = 2 * L * 32 * np.finfo(np.float32).eps


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_best_token(seed):
    found = follow(chain(tables(seed))[1], max_length=L, pad=-1)
    for example in range(B):
        oracle = Oracle(tables(seed), example)
        tokens = oracle.greedy()
        assert found.tokens[example].tolist() == [*tokens, *[-1] * (L - len(tokens))]
        assert found.lengths[example] == len(tokens)
        np.testing.assert_allclose(
            found.scores[example], oracle.log_probability(tokens), rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed):
    carry = chain(tables(seed))[1]
    beam = jax.tree.map(
        lambda leaf: leaf[:, 0], search(carry, max_length=L, width=1, length_penalty=0.0)
    )
    single = follow(carry, max_length=L)
    np.testing.assert_allclose(beam.scores, single.scores, rtol=0, atol=TOLERANCE)
    chex.assert_trees_all_equal(beam._replace(scores=0), single._replace(scores=0))


@pytest.mark.parametrize("max_length", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_short_sequences(alpha, max_length):
    """After one step it has lost none of the beginnings."""
    for seed in range(3):
        found = search(chain(tables(seed))[1], max_length=max_length, width=C, length_penalty=alpha)
        for example in range(B):
            best = sorted(
                Oracle(tables(seed), example).everything(alpha, max_length), reverse=True
            )[:C]
            assert sequences(found, example) == [tokens for _, tokens in best]
            np.testing.assert_allclose(
                found.scores[example], [score for score, _ in best], rtol=0, atol=TOLERANCE
            )


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_beam_follows_its_definition_and_stops_exactly(width, alpha):
    for seed in range(5):
        found = search(chain(tables(seed))[1], max_length=L, width=width, length_penalty=alpha)
        for example in range(B):
            expected = Oracle(tables(seed), example).beam(width, alpha)
            assert sequences(found, example) == expected


def test_a_wider_beam_finds_what_greedy_misses():
    """The likelier first token leads nowhere: 0.6 · 0.5 < 0.4 · 1."""
    first, second = (
        jnp.log(jnp.array([0.6, 0.4, 1e-9])),
        jnp.log(jnp.array([[0.5, 0.5, 1e-9], [1e-9, 1e-9, 1.0]])),
    )

    def step(begun, last):
        return jnp.ones_like(begun), jnp.where(begun[:, None], second[jnp.minimum(last, 1)], first)

    options = {"carry": jnp.zeros(1, bool), "start": jnp.array([0]), "end": 2, "max_length": 2}
    assert greedy(step, **options).tokens.tolist() == [[0, 0]]
    assert beam_search(step, **options, width=2).tokens[0, 0].tolist() == [1, 2]


def test_ties_go_to_the_earlier_the_better_parent_the_lower_id():
    def fair(carry, last):
        return carry, jnp.zeros((*last.shape, 3))

    options = {"start": jnp.array([0]), "end": 2, "max_length": 2}
    assert greedy(fair, (), **options).tokens.tolist() == [[0, 0]]
    found = beam_search(fair, (), **options, width=3)
    assert sequences(found, 0) == [(2,), (0, 0), (0, 1)]


@pytest.mark.parametrize("width", [None, 2])
def test_the_search_stops_when_all_have_ended(width):
    steps = []

    def sure(carry, last):
        """Count upwards, ending at 3, almost surely."""
        jax.debug.callback(lambda _: steps.append(1), last)
        return carry, 50 * jax.nn.one_hot(jnp.minimum(last + 1, 3), 5)

    options = {"start": jnp.array([0, 2]), "end": 3, "max_length": 101}
    found = (
        greedy(sure, (), **options)
        if width is None
        else beam_search(sure, (), **options, width=width)
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    lengths = found.lengths if width is None else found.lengths[:, 0]
    assert lengths.tolist() == [3, 1]
    assert len(steps) < 11 * (width or 1)


def test_under_jit_each_search_is_traced_once():
    @jax.jit
    @chex.assert_max_traces(1)
    def both(carry, start):
        step, _ = chain(tables())
        options = {"start": start, "end": END, "max_length": L}
        return greedy(step, carry, **options), beam_search(step, carry, **options, width=2)

    for seed in range(3):
        both(chain(tables(seed))[1], (START + seed) % C)


def test_in_x64_scores_are_double(x64):
    step = lambda carry, last: (carry, jnp.zeros((*last.shape, 3), jnp.float64))  # noqa: E731
    found = beam_search(
        step, (), start=np.array([0]), end=2, max_length=2, width=2, length_penalty=0.5
    )
    assert found.scores.dtype == jnp.float64 and found.tokens.dtype == jnp.int32


def test_bfloat16_logits_are_summed_in_float32():
    step = lambda carry, last: (carry, jnp.zeros((*last.shape, 3), jnp.bfloat16))  # noqa: E731
    options = {"start": np.array([0]), "end": 2, "max_length": 2}
    for found in (greedy(step, (), **options), beam_search(step, (), **options, width=2)):
        assert found.scores.dtype == jnp.float32


def test_impossible_tokens_are_never_taken():
    step = lambda carry, last: (carry, jnp.tile(jnp.array([0.0, -jnp.inf, -1.0]), (*last.shape, 1)))  # noqa: E731
    found = beam_search(step, (), start=np.array([0]), end=2, max_length=3, width=3)
    assert sequences(found, 0) == [(0, 0, 0), (2,), (0, 2)]  # 0.39, 0.27, 0.20


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "end must lie in 0 … 4", {"end": 5}),
        (ValueError, "end must lie in 0 … 4", {"end": -1}),
        (ValueError, "max_length must be an integer of at least 1, got 0", {"max_length": 0}),
        (ValueError, "width must be an integer of at least 1", {"width": 0}),
        (ValueError, "width must lie in 1 … 5 .* vocabulary.*, got 6", {"width": C + 1}),
        (ValueError, "length_penalty", {"length_penalty": -0.5}),
        (ValueError, "start must be", {"start": np.array(0)}),
        (TypeError, "start must be integers", {"start": np.zeros(B)}),
        (ValueError, "carry.* must be", {"start": START[:2]}),
        (ValueError, "logits must be", {"step": lambda carry, last: (carry, jnp.zeros((B, 1, C)))}),
        (
            TypeError,
            "logits must be floating",
            {"step": lambda carry, last: (carry, jnp.zeros((B, C), int))},
        ),
        (
            ValueError,
            "step must return a carry",
            {"step": lambda carry, last: (carry[:2], jnp.zeros((B, C)))},
        ),
        (
            ValueError,
            "two tokens",
            {"step": lambda carry, last: (carry, jnp.zeros((B, 1))), "end": 0},
        ),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    step, carry = chain(tables())
    options = {
        "step": step,
        "carry": carry,
        "start": START,
        "end": END,
        "max_length": L,
        "width": 2,
    }
    with pytest.raises(error, match=message):
        beam_search(**{**options, **arguments})
    if not {"width", "length_penalty"} & arguments.keys() and "two tokens" not in message:
        del options["width"]
        with pytest.raises(error, match=message):
            greedy(**{**options, **arguments})
