"""Generation against the definition: a full pass over the whole text for every token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import ropes
from jattn.models import CausalLM
from jattn.models.causal_lm import Config

C, L = 23, 9
SIZES = {"features": 12, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "mlp_features": 20}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8], [9, 7]]
LENGTHS = np.array([len(prompt) for prompt in PROMPTS])
# Every text crosses M and L₀ at another place, or begins beyond
DYNAMIC = ropes.Dynamic(50.0, factor=3.0, max_length=12)
LONG = ropes.LongRope(50.0, short_factors=(1.0,), long_factors=(6.0,), original_length=12)
FORMS = {
    "plain": {},
    "a window that wraps, dynamic": {
        "window": 3, "rope": DYNAMIC, "head_features": 4, "num_layers": 1,
    },
    "a mixture of windows, longrope": {"window": (None, 4), "rope": LONG},
    "windows of one and two": {"window": (1, 2)},
    "dynamic": {"rope": DYNAMIC, "head_features": 4},
    "linear": {"rope": ropes.Linear(50.0, factor=3.0), "window": (5, None)},
    "llama 3": {"rope": ropes.Llama3(50.0, 8.0, 1.0, 4.0, 12), "head_features": 8},
    "yarn": {"rope": ropes.Yarn(50.0, factor=3.0, original_length=6), "head_features": 8},
    "with biases, normalised, tied": {
        "qkv_bias": True, "out_bias": True, "mlp_bias": True, "normalize_qk": True, "tied": True,
    },
}  # fmt: skip
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# A score is a sum of L log-probabilities, each a difference of numbers below 32 in magnitude
TOLERANCE = 2 * L * 32 * np.finfo(np.float32).eps
DRAW = {"temperature": 1.3, "top_k": 15, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


def forms(function):
    cases = [
        (pytest.param if "mix" in name else slow)(form, id=name) for name, form in FORMS.items()
    ]
    return pytest.mark.parametrize("form", cases)(function)


@functools.cache
def make(*, dtype=np.float32, attend=jattn.attend, **form):
    """A model whose weights are so large that the best token changes from step to step."""
    model = CausalLM(Config(C, **SIZES | form), attend=attend, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(model)

    def enlarged(path, x):
        is_embedding = "embedding" in jax.tree_util.keystr(path)
        return (x if x.ndim == 1 else x * (2 if is_embedding else 30)).astype(dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(enlarged, state))


def padded(left=False, fill=0, prompts=PROMPTS):
    tokens = np.full((len(prompts), max(map(len, prompts))), fill)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[-len(prompt) if left else 0 : None if left else len(prompt)] = prompt
    return tokens


class Oracle:
    """The definition. Causality lets it read texts that are padded to one length."""

    def __init__(self, model):
        self.run = jax.jit(lambda tokens, length: model(tokens, rope_length=length)[0])

    def logits(self, text, rope_length):
        """Of the token that follows each of a text, `[T, C]`."""
        tokens = np.zeros((1, 20), int)
        tokens[0, : len(text)] = text
        return np.array(self.run(tokens, rope_length))[: len(text)]

    def greedy(self, prompt, stop=(), penalty=1.0):
        """The tokens of one prompt alone, and their score."""
        text = list(prompt)
        while len(text) < len(prompt) + L and (text == prompt or text[-1] not in stop):
            logits = self.logits(text, len(prompt) + L)[-1]
            for token in set(text):
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            text.append(int(logits.argmax()))
        return text[len(prompt) :], self.score(prompt, text[len(prompt) :])

    def score(self, prompt, found):
        """The log-probability of a text that was found."""
        logits = self.logits([*prompt, *found], len(prompt) + L).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(log_p[len(prompt) - 1 + t, token] for t, token in enumerate(found))

    def everything(self, **options):
        """Tokens of every prompt, and scores."""
        return tuple(zip(*(self.greedy(prompt, **options) for prompt in PROMPTS), strict=True))


@functools.cache
def oracle(model):
    return Oracle(model)


def rows(decoded):
    """The tokens of every row up to its length."""
    tokens, lengths = np.asarray(decoded.tokens), decoded.lengths.tolist()
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


@forms
def test_every_prompt_goes_on_as_the_full_pass_of_it_alone_does(x64, form):
    """Ragged, padded on either side with whatever it is."""
    model = make(dtype=np.float64, **form)
    texts, scores = oracle(model).everything()
    assert len(set(itertools.chain(*texts))) > 5
    for left, fill in ((False, 0), (False, 7), (True, 0), (True, -1), (False, 2**40)):
        given = {"lengths": LENGTHS, "left_padded": left, "max_new_tokens": L}
        found = model.generate(padded(left, fill), **given)
        assert rows(found) == list(texts)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-9)
        assert found.scores.dtype == jnp.float64


@pytest.fixture(scope="module")
def model():
    return make(num_layers=1)


def test_prompts_of_one_token_and_no_lengths(model):
    found = model.generate(np.array([[6], [2]]), max_new_tokens=L)
    assert rows(found) == [oracle(model).greedy([token])[0] for token in (6, 2)]
    assert found.lengths.tolist() == [L, L]


@pytest.mark.parametrize("penalty", [1.4, 0.05])
def test_a_repetition_penalty_counts_the_prompt_and_the_text_and_no_padding(model, penalty):
    texts, scores = oracle(model).everything(penalty=penalty)
    assert texts != oracle(model).everything()[0]
    for fill in (8, 15):
        given = {"lengths": LENGTHS, "left_padded": True, "max_new_tokens": L}
        found = model.generate(padded(True, fill), repetition_penalty=penalty, **given)
        assert rows(found) == list(texts)
        np.testing.assert_allclose(found.scores, scores, rtol=0, atol=TOLERANCE)


# The end of a text.


@pytest.fixture(scope="module")
def unstopped(model):
    return model.generate(padded(), lengths=LENGTHS, max_new_tokens=L)


def cut(tokens, stop):
    """The tokens up to the first that stops."""
    ends = [t + 1 for t, token in enumerate(tokens) if token in stop]
    return tokens[: min(ends, default=len(tokens))]


@pytest.fixture(scope="module")
def stop(unstopped):
    texts = rows(unstopped)
    return texts[0][2], texts[2][4], texts[3][6]


def test_each_of_several_tokens_ends_a_text_and_is_the_last_of_it(model, unstopped, stop):
    found = model.generate(padded(), lengths=LENGTHS, max_new_tokens=L, stop=np.array(stop))
    texts, scores = oracle(model).everything(stop=stop)
    assert rows(found) == list(texts) == [cut(text, stop) for text in rows(unstopped)]
    assert found.lengths.tolist() == [len(text) for text in texts]
    assert found.lengths.min() < found.lengths.max()
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=TOLERANCE)
    for row, length in zip(np.asarray(found.tokens), found.lengths.tolist(), strict=True):
        assert row[length:].tolist() == [stop[0]] * (L - length)


def test_a_stop_in_the_prompt_does_not_count(model, unstopped):
    texts = rows(unstopped)
    stop = next(token for token in PROMPTS[0] if token not in texts[0])
    found = model.generate(padded(), lengths=LENGTHS, max_new_tokens=L, stop=stop)
    assert rows(found) == [cut(text, [stop]) for text in texts]
    assert found.lengths[0] == L


PADS = [
    pytest.param(21, {"stop": (21,)}, {}, id="the stop, without a word"),
    pytest.param(0, {"pad": 0}, {"stop": [21, 3]}, id="the config's"),
    slow(0, {"stop": (21,), "pad": 4}, {"pad": 0}, id="the call's"),
    slow(10, {"stop": (21,)}, {"stop": ()}, id="no more, as none stops"),
]


@pytest.mark.parametrize(("fill", "form", "given"), PADS)
def test_config_and_call_say_what_ends_a_text_and_what_fills_the_rest(fill, form, given):
    model = make(**{"num_layers": 1, "num_kv_heads": 1, "mlp_features": 1} | form)
    found = model.generate(np.array([[5]]), max_new_tokens=2, **given)
    assert found.tokens.tolist() == [[21, fill]]
    assert found.lengths.tolist() == [2 if given.get("stop") == () else 1]


def counted(calls):
    """An `attend` that counts its traces, and each time that it runs."""

    def attend(*arrays, **options):
        calls["traced"] += 1
        jax.debug.callback(lambda: calls.update(run=calls["run"] + 1))
        return jattn.attend(*arrays, **options)

    return attend


@pytest.fixture
def calls():
    return {"traced": 0, "run": 0}


def test_the_loop_ends_as_soon_as_every_text_has(unstopped, calls):
    model, text = make(attend=counted(calls), num_layers=1), rows(unstopped)[0]
    length = len(cut(text, text[2:3]))
    prompts = jnp.array([PROMPTS[0]] * 2)
    jax.block_until_ready(model.generate(prompts, max_new_tokens=1000, stop=text[2]))
    jax.effects_barrier()
    assert calls["run"] == 1 + length  # the prompt, and the steps


# Draws.


@pytest.fixture(scope="module")
def draw(model):
    return functools.partial(
        model.generate, padded(), lengths=LENGTHS, max_new_tokens=L, **DRAW, key=jax.random.key(5)
    )


def test_draws_depend_on_the_key_and_the_options_alone(model, draw, unstopped):
    first = draw()
    for name in ("tokens", "scores", "lengths"):
        np.testing.assert_array_equal(getattr(draw(), name), getattr(first, name))
    others = [{"key": jax.random.key(6)}, {"temperature": 9.0}, {"top_k": 1, "top_p": 0.1}]
    texts = [first, *(draw(**other) for other in others)]
    for one, two in itertools.combinations(texts, 2):
        assert rows(one) != rows(two)
    certain = draw(top_k=1, repetition_penalty=1.0)
    assert rows(certain) == rows(unstopped)
    assert rows(draw(temperature=1e-6, repetition_penalty=1.0)) == rows(unstopped)


@pytest.mark.slow
def test_the_first_row_is_drawn_as_if_it_were_alone(model, draw):
    """By a key of either kind."""
    given = {"lengths": LENGTHS[:1], "max_new_tokens": L, **DRAW}
    alone = model.generate(padded()[:1], key=jax.random.PRNGKey(5), **given)
    assert rows(alone) == rows(draw())[:1]


@pytest.mark.slow
def test_tokens_follow_the_law_of_the_model_at_every_step(model):
    """Of many rows, each with its own key, and of the rows that went one way, the next step."""
    B = 8000
    prompts, key = np.full((B, 1), 6), jax.random.key(1)
    found = model.generate(prompts, max_new_tokens=2, temperature=1.5, key=key).tokens
    often = int(np.bincount(found[:, 0]).argmax())
    for text, tokens in (([6], found[:, 0]), ([6, often], found[found[:, 0] == often, 1])):
        law = np.exp(oracle(model).logits(text, None)[-1] / 1.5)
        law, counts = law / law.sum(), np.bincount(tokens, minlength=C)
        # Five standard deviations of a count
        bound = 5 * np.sqrt(len(tokens) * law) + 5
        assert (np.abs(counts - len(tokens) * law) < bound).all()


def test_scores_are_the_log_probabilities_by_the_logits_of_the_model_itself(model, draw):
    """Whatever temperature, filters and penalty made of them."""
    found = draw()
    scores = map(oracle(model).score, PROMPTS, rows(found))
    np.testing.assert_allclose(found.scores, list(scores), rtol=0, atol=TOLERANCE)


# Token by token.

STREAMED = {
    "drawn": {**DRAW, "key": jax.random.key(5)},
    "penalised": {"repetition_penalty": 1.1, "left_padded": True, "stop": (9, 15)},
}


@pytest.mark.parametrize("options", [STREAMED["drawn"], slow(STREAMED["penalised"])], ids=STREAMED)
def test_a_stream_is_what_generate_gives(model, options):
    given = {"lengths": LENGTHS, "max_new_tokens": L, **options}
    tokens = padded(options.get("left_padded", False))
    whole = model.generate(tokens, **given)
    steps = list(model.stream(tokens, **given))
    assert all(step.shape == (4,) and step.dtype == np.int32 for step in steps)
    assert len(steps) == whole.lengths.max()
    np.testing.assert_array_equal(np.stack(steps, 1), whole.tokens[:, : len(steps)])


def test_two_streams_of_one_model_do_not_mix_and_end_when_all_texts_have(model, stop):
    expected = model.generate(padded(), lengths=LENGTHS, max_new_tokens=L, stop=stop)
    orders = slice(None), slice(None, None, -1)
    streams = [
        model.stream(padded()[order], lengths=LENGTHS[order], max_new_tokens=L, stop=stop)
        for order in orders
    ]
    steps = list(zip(*streams, strict=True))
    assert len(steps) == expected.lengths.max() < L
    for step, both in enumerate(steps):
        for tokens, order in zip(both, orders, strict=True):
            np.testing.assert_array_equal(tokens, expected.tokens[order, step])


def live():
    return len(jax.live_arrays()), sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("count", [200, slow(1000)])
def test_a_stream_compiles_one_step_and_holds_no_more_memory_at_its_end(calls, count):
    model = make(attend=counted(calls), num_layers=1, window=8)
    texts = model.stream(padded(), lengths=LENGTHS, max_new_tokens=count, repetition_penalty=1.1)
    begun = [next(texts) for _ in range(3)]
    traced, held = calls["traced"], live()
    rest = sum(1 for _ in texts)
    assert len(begun) + rest == count and calls["traced"] == traced
    assert live()[0] <= held[0] and live()[1] <= held[1]


# Compilation.


def test_other_values_are_no_other_program(calls):
    model = make(attend=counted(calls), num_layers=1)
    draw = functools.partial(model.generate, max_new_tokens=2, stop=(1, 2))
    key = jax.random.key(0)
    first = {"lengths": [3, 2, 1, 1], "temperature": 1.0, "top_k": 3, "min_p": 0.1, "key": key}
    jax.block_until_ready(draw(padded(), **first))
    traced = calls["traced"]
    for other in (
        {"temperature": 2},
        {"temperature": np.float64(0.5), "top_k": np.int64(2), "min_p": 1},
        {"temperature": jnp.float32(0.5), "top_k": jnp.int32(9), "min_p": jnp.bfloat16(0.5)},
        {"lengths": jnp.array([1, 1, 2, 7]), "key": jax.random.key(1)},
        {"lengths": np.array([1, 1, 2, 7], np.uint8), "stop": [1, 2]},
    ):
        jax.block_until_ready(draw(padded().astype(np.uint8), **first | other))
    assert calls["traced"] == traced


def run(model, tokens, lengths):
    return model.generate(tokens, lengths=lengths, max_new_tokens=L).tokens


def test_under_jit_and_vmap(model, unstopped):
    @jax.jit
    def singly(tokens, lengths):
        return jax.vmap(functools.partial(run, model))(tokens[:, None], lengths[:, None])[:, 0]

    np.testing.assert_array_equal(singly(padded(), LENGTHS), unstopped.tokens)


@pytest.mark.slow
def test_under_nnx_jit_and_without_any(model, unstopped):
    np.testing.assert_array_equal(nnx.jit(run)(model, padded(), LENGTHS), unstopped.tokens)
    with jax.disable_jit():
        np.testing.assert_array_equal(run(model, padded(), LENGTHS), unstopped.tokens)


@pytest.fixture(scope="module")
def traced(model):
    @jax.jit
    def traced(tokens, **options):
        return model.generate(tokens, max_new_tokens=L, **options)

    return functools.partial(traced, lengths=LENGTHS, key=jax.random.key(5), **DRAW)


def test_options_may_be_traced(traced, draw):
    assert rows(traced(padded(fill=-5))) == rows(draw())


def test_what_is_traced_and_wrong_makes_scores_nan(traced):
    for wrong in (0, 8, -1):
        found = traced(padded(), lengths=np.array([wrong, 1, 4, 2])).scores
        assert np.isnan(found).tolist() == [True, False, False, False]
    tokens = padded()
    tokens[2, 1] = C
    assert np.isnan(traced(tokens).scores).tolist() == [False, False, True, False]
    for name, number in {"temperature": -1.0, "top_k": 0, "top_p": 1.5, "min_p": -0.1}.items():
        assert np.isnan(traced(padded(), **{name: number}).scores).all()


def test_a_traced_length_of_0_makes_scores_nan_even_where_no_cache_sees_it(model):
    @jax.jit
    def scores(lengths):
        tokens = np.array([[6], [2]])
        return model.generate(tokens, lengths=lengths, max_new_tokens=1).scores

    assert np.isnan(scores(np.array([0, 1]))).tolist() == [True, False]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.slow
def test_a_batch_over_two_devices(model, draw, kind):
    """Draws, too, are those of the rows on one device."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    graphdef, state = nnx.split(model)
    with jax.set_mesh(mesh):
        spread = nnx.merge(graphdef, jax.device_put(state, NamedSharding(mesh, P())))
        over = NamedSharding(mesh, P("x"))
        given = jax.device_put((padded(True), LENGTHS), over)
        options = {"left_padded": True, "max_new_tokens": L, "key": jax.random.key(5), **DRAW}
        found = spread.generate(given[0], lengths=given[1], **options)
        steps = list(spread.stream(given[0], lengths=given[1], **options))
        assert found.tokens.sharding.spec[0] == found.scores.sharding.spec[0] == "x"
    np.testing.assert_array_equal(jax.device_get(found.tokens), draw().tokens)
    np.testing.assert_array_equal(np.stack(steps, 1), draw().tokens)


# Kinds of models and of input.


def test_a_bfloat16_model_sums_its_scores_in_float32(model):
    found = make(dtype=jnp.bfloat16, num_layers=1).generate(
        padded(), lengths=LENGTHS, max_new_tokens=L
    )
    assert found.scores.dtype == jnp.float32
    # Of logits up to 8 in magnitude, of 8 bits
    scores = map(oracle(model).score, PROMPTS, rows(found))
    np.testing.assert_allclose(found.scores, list(scores), rtol=0, atol=2 * L * 8 * 2**-8)


def test_integers_of_every_kind_are_tokens(model, unstopped):
    for kind in (np.uint8, np.int8, np.int64, jnp.uint32):
        lengths = LENGTHS.astype(kind)
        found = model.generate(padded().astype(kind), lengths=lengths, max_new_tokens=L)
        np.testing.assert_array_equal(found.tokens, unstopped.tokens)
    found = model.generate(padded().tolist(), lengths=LENGTHS.tolist(), max_new_tokens=L)
    np.testing.assert_array_equal(found.tokens, unstopped.tokens)


def test_no_prompts_at_all(model):
    found = model.generate(jnp.zeros((0, 3), int), max_new_tokens=L)
    assert found.tokens.shape == (0, L) and found.scores.shape == found.lengths.shape == (0,)


FEW = np.array([[3, 1, 4], [1, 5, 9]])
WRONG = {
    "no tokens": (ValueError, r"tokens must hold at least one token", {"tokens": FEW[:, :0]}),
    "one axis": (ValueError, r"tokens must be \[B, T\], got shape \(3,\)", {"tokens": FEW[0]}),
    "three axes": (ValueError, r"tokens must be \[B, T\]", {"tokens": FEW[None]}),
    "floats": (TypeError, r"tokens must be integers, got float64", {"tokens": FEW * 1.0}),
    "an id too high": (ValueError, r"tokens must lie in 0 … 22 .* got 23", {"tokens": FEW + 14}),
    "an id below 0": (ValueError, r"tokens must lie in 0 … 22 .* got -1", {"tokens": FEW - 2}),
    "a wrong id among real ones": (
        ValueError, r"tokens must lie in", {"tokens": FEW - 2, "lengths": [1, 3]},
    ),
    "a length of 0": (ValueError, r"lengths must lie in 1 … 3 .* got 0", {"lengths": [0, 3]}),
    "a length above T": (ValueError, r"lengths must lie in 1 … 3 .* got 4", {"lengths": [4, 3]}),
    "a length too few": (ValueError, r"lengths must be \[B\] with B = 2", {"lengths": [3]}),
    "float lengths": (TypeError, r"lengths must be integers", {"lengths": [1.0, 2.0]}),
    "left without lengths": (ValueError, r"left_padded needs lengths", {"left_padded": True}),
    "left a side": (TypeError, r"left_padded must be True or False", {"left_padded": "left"}),
    "no new tokens": (ValueError, r"max_new_tokens must be .* got 0", {"max_new_tokens": 0}),
    "half a token": (ValueError, r"max_new_tokens must be .* got 1.5", {"max_new_tokens": 1.5}),
    "a stop too high": (ValueError, r"stop must lie in 0 … 22 .* got 23", {"stop": 23}),
    "a stop below 0": (ValueError, r"stop must lie in 0 … 22 .* got -1", {"stop": (3, -1)}),
    "half a stop": (TypeError, r"stop must be integers, got float", {"stop": 2.5}),
    "a table of stops": (ValueError, r"stop must be one id, or a list of ids", {"stop": [[3, 1]]}),
    "several pads": (ValueError, r"pad must be one id, got \[3, 1\]", {"pad": [3, 1]}),
    "a pad too high": (ValueError, r"pad must lie in 0 … 22 .* got 99", {"pad": 99}),
    "a filter alone": (ValueError, r"top_p needs a temperature above 0", {"top_p": 0.9}),
    "no key": (ValueError, r"temperature = 0.7 draws tokens: pass key", {"temperature": 0.7}),
    "a key alone": (ValueError, r"key needs a temperature", {"key": jax.random.key(0)}),
    "a penalty of 0": (ValueError, r"repetition_penalty must be", {"repetition_penalty": 0}),
    "no such option": (TypeError, r"unexpected keyword argument 'top_q'", {"top_q": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "match", "given"), WRONG.values(), ids=WRONG)
def test_bad_input_is_named_at_the_call_before_anything_is_compiled(calls, error, match, given):
    model = make(attend=counted(calls), num_layers=1)
    for call in (model.generate, model.stream):
        with pytest.raises(error, match=match):
            call(**{"tokens": FEW} | given)
    assert calls == {"traced": 0, "run": 0}
