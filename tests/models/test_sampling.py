"""Filters of logits against loops in NumPy and against transformers; draws against their law."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models import sampling
from jattn.models.sampling import choose, min_p, repetition_penalty, top_k, top_p

C = 29
SHAPES = [(C,), (2, 3, C)]
NUMBERS = {top_k: (1, 2, 7, C, C + 5), top_p: (0.01, 0.5, 0.9, 1.0), min_p: (0.0, 0.02, 0.5, 1.0)}
PAIRS = [(keep, number) for keep, numbers in NUMBERS.items() for number in numbers]
SLOW_HALF = pytest.param(jnp.float16, marks=pytest.mark.slow)
NAMES = {top_k: "top_k", top_p: "top_p", min_p: "min_p"}


def pairs(function):
    ids = [f"{NAMES[keep]} {number}" for keep, number in PAIRS]
    return pytest.mark.parametrize(("keep", "number"), PAIRS, ids=ids)(function)


def softmax(row):
    weights = [np.exp(np.float64(logit) - max(row)) for logit in row]
    return [weight / sum(weights) for weight in weights]


def kept_by_definition(keep, number, row):
    """The ids that a filter leaves of one row of logits, told in words of one token each."""
    if keep is top_k:
        return {c for c in range(len(row)) if sum(other > row[c] for other in row) < number}
    p = softmax(row)
    if keep is min_p:
        return {c for c in range(len(row)) if not p[c] < number * max(p)}
    kept, total = set(), 0.0
    for c in sorted(range(len(row)), key=lambda c: (-p[c], c)):
        if total < number or number == 1:
            kept.add(c)
        total += p[c]
    return kept


def kept(logits):
    """The ids of one row that are not forbidden."""
    return set(np.flatnonzero(np.asarray(logits) > -np.inf).tolist())


def random_logits(rng, shape, dtype=np.float32):
    """Some of several units, so that the filters differ, and no ties."""
    return (3 * rng.permutation(rng.normal(size=shape))).astype(dtype)


@pairs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filters_leave_what_they_say_as_it_was_and_forbid_the_rest(rng, keep, number, shape):
    logits = random_logits(rng, shape)
    found = np.asarray(keep(jnp.asarray(logits), number))
    assert found.shape == shape and found.dtype == np.float32
    for before, after in zip(logits.reshape(-1, C), found.reshape(-1, C), strict=True):
        assert kept(after) == kept_by_definition(keep, number, before)
    np.testing.assert_array_equal(found, np.where(found > -np.inf, logits, -np.inf))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_a_penalty_makes_what_was_seen_less_probable_whatever_its_sign(rng, penalty, shape):
    logits, seen = random_logits(rng, shape), rng.random(shape) < 0.4
    found = np.asarray(repetition_penalty(jnp.asarray(logits), jnp.asarray(seen), penalty))
    expected = logits.copy()
    for index in np.ndindex(*shape):
        if seen[index]:
            positive = logits[index] > 0
            expected[index] = logits[index] / penalty if positive else logits[index] * penalty
    np.testing.assert_allclose(found, expected, rtol=1e-6)


TORCH = {top_k: "TopKLogitsWarper", top_p: "TopPLogitsWarper", min_p: "MinPLogitsWarper"}


@pytest.mark.torch
@pairs
@pytest.mark.parametrize("rows", [1, 5])
def test_filters_are_those_of_transformers(rng, keep, number, rows):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits = random_logits(rng, (rows, C))
    theirs = getattr(transformers, TORCH[keep])(number)(None, torch.tensor(logits))
    np.testing.assert_array_equal(keep(jnp.asarray(logits), number), theirs.numpy())


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_penalty_is_that_of_transformers(rng, penalty):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits, text = random_logits(rng, (4, C)), rng.integers(0, C, (4, 20))
    seen = np.zeros((4, C), bool)
    np.put_along_axis(seen, text, True, axis=1)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.tensor(text), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(
        repetition_penalty(jnp.asarray(logits), jnp.asarray(seen), penalty), theirs, rtol=1e-6
    )


@pytest.mark.torch
def test_all_of_them_together_are_those_of_transformers(rng):
    """The tokens that can be drawn, by many keys, are those that transformers leaves."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    options = {"top_k": 12, "top_p": 0.9, "min_p": 0.05}
    logits, text = random_logits(rng, (1, C)), rng.integers(0, C, (1, 6))
    scores = torch.tensor(logits)
    chain = [transformers.RepetitionPenaltyLogitsProcessor(1.4)]
    chain += [transformers.TemperatureLogitsWarper(1.7)]
    chain += [getattr(transformers, TORCH[keep])(options[NAMES[keep]]) for keep in NUMBERS]
    for processor in chain:
        scores = processor(torch.tensor(text), scores)
    seen = np.zeros((1, C), bool)
    seen[0, text] = True
    law = law_of(logits, seen, {"repetition_penalty": 1.4, "temperature": 1.7} | options)
    assert_drawn_by(law, np.asarray(torch.softmax(scores, -1)[0], np.float64))


FRACTIONS = np.log([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
@pytest.mark.parametrize("shift", [0.0, -3.3, 17.0])
@pytest.mark.parametrize(("p", "count"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.95, 3)])
def test_top_p_keeps_the_token_that_crosses_p_and_none_after_it(order, shift, p, count):
    """Whichever way the sums round: 0.5 + 0.3 is 0.8."""
    logits = jnp.asarray(FRACTIONS[list(order)] + shift, jnp.float32)
    assert kept(top_p(logits, p)) == {order.index(c) for c in range(count)}
    with jax.enable_x64(True):
        logits = jnp.asarray(FRACTIONS[list(order)] + shift, jnp.float64)
        assert kept(top_p(logits, p)) == {order.index(c) for c in range(count)}


def test_top_p_of_1_keeps_tokens_that_a_rounded_sum_leaves_out():
    logits = jnp.array([0.0, 0.0, -40.0, -200.0])
    assert kept(top_p(logits, 1.0)) == kept(jax.jit(top_p)(logits, 1.0)) == {0, 1, 2, 3}
    assert kept(top_p(logits, 0.999999)) == {0, 1}


def test_ties_top_k_keeps_all_that_equal_the_kth_and_top_p_the_lower_ids():
    logits = jnp.array([1.0, 2.0, 1.0, 0.0, 1.0])
    assert kept(top_k(logits, 2)) == kept(top_k(logits, 4)) == {0, 1, 2, 4}
    assert kept(top_k(logits, 1)) == {1}
    assert kept(top_p(jnp.zeros(8), 0.5)) == {0, 1, 2, 3}


def test_min_p_forbids_what_lies_strictly_below_and_never_the_best():
    logits = jnp.log(jnp.array([0.25, 0.5, 0.125, 0.125]))
    assert kept(min_p(logits, 0.5)) == {0, 1}
    assert kept(min_p(logits, 0.25)) == {0, 1, 2, 3}
    assert kept(min_p(logits, 1.0)) == {1}
    assert kept(min_p(jnp.zeros(4), 1.0)) == {0, 1, 2, 3}


@pairs
def test_the_best_token_always_stays(keep, number):
    for logits in ([0.0, 88.0, -88.0], [-1e30, 1e30, 0.0], [0.0, 1e-30, -1e-30]):
        assert 1 in kept(keep(jnp.array(logits), number))


INF = np.inf
EXTREMES = {
    "one certain": ([-INF, 2.0, -INF], {1}),
    "one infinite": ([5.0, INF, -INF], {1}),
    "some impossible": ([-INF, 2.0, 1.99], {1, 2}),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, SLOW_HALF])
@pytest.mark.parametrize(("logits", "possible"), EXTREMES.values(), ids=EXTREMES)
def test_extreme_logits_stay_what_they_are(logits, possible, dtype):
    logits = jnp.array(logits, dtype)
    for keep, number in PAIRS:
        found = keep(logits, number)
        assert found.dtype == dtype and not np.isnan(found).any()
        assert kept(found) <= kept(logits) and 1 in kept(found)
    found = repetition_penalty(logits, jnp.ones(3, bool), 1.5)
    assert found.dtype == dtype and kept(found) == kept(logits)
    for temperature in (1e-38, 0.7, 3e38):
        chosen = drawn(logits[None], {"temperature": temperature}, 50)
        assert set(chosen.ravel()) <= possible


def test_beside_an_infinite_logit_all_others_are_improbable():
    logits = jnp.array([5.0, INF, -INF, INF, 88.0])
    assert kept(min_p(logits, 0.1)) == kept(top_k(logits, 2)) == {1, 3}
    assert kept(top_p(logits, 0.4)) == {1} and kept(top_p(logits, 0.6)) == {1, 3}
    assert set(drawn(logits[None], {"temperature": 1.0}, 50).tolist()) == {1, 3}


def test_nan_logits_are_not_made_into_a_choice():
    logits = jnp.array([0.0, jnp.nan, 1.0])
    for keep, number in PAIRS:
        assert np.isnan(keep(logits, number)).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, SLOW_HALF])
def test_sums_of_half_precision_are_taken_in_float32(rng, dtype):
    """In bfloat16 the sum of 1,000 equal tokens stands still at 256 of them."""
    assert len(kept(top_p(jnp.zeros(1000, dtype), 0.5))) == 500
    logits = jnp.asarray(random_logits(rng, (1000,)), dtype)
    for keep, number in ((top_p, 0.9), (min_p, 0.07)):
        assert kept(keep(logits, number)) == kept(keep(logits.astype(jnp.float32), number))
    seen = jnp.ones(1000, bool)
    found = repetition_penalty(logits, seen, 1.1)
    exact = repetition_penalty(logits.astype(jnp.float32), seen, 1.1).astype(dtype)
    np.testing.assert_array_equal(found, exact)


@pairs
def test_a_traced_number_gives_the_same_and_no_other_trace(rng, keep, number):
    logits = jnp.asarray(random_logits(rng, (3, C)))
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lambda number: keep(logits, number), n=1))
    np.testing.assert_array_equal(traced(number), keep(logits, number))
    np.testing.assert_array_equal(traced(type(number)(1)), keep(logits, 1))


@pytest.mark.parametrize("kind", [np.float64, np.float32, jnp.float32, jnp.bfloat16])
def test_numbers_of_every_kind_are_taken(rng, kind):
    logits, seen = jnp.asarray(random_logits(rng, (C,))), jnp.ones(C, bool)
    for keep in (top_p, min_p, lambda logits, p: repetition_penalty(logits, seen, p)):
        np.testing.assert_array_equal(keep(logits, kind(0.5)), keep(logits, 0.5))
    for k in (np.uint8(3), np.int64(3), jnp.int32(3), jnp.uint8(3)):
        assert len(kept(top_k(logits, k))) == len(kept(jax.jit(top_k)(logits, k))) == 3
    assert len(kept(top_k(logits, 2**40))) == C


def test_numbers_of_every_kind_are_taken_in_x64(rng, x64):
    logits = jnp.asarray(random_logits(rng, (C,)))
    for keep, number in PAIRS:
        for given in (number, np.asarray(number), jnp.asarray(number)):
            assert keep(logits, given).dtype == logits.dtype == jnp.float32


# The choice: filters in their order, then a draw.


def keys_of(rows, seed=0):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


@functools.partial(jax.jit, static_argnums=2)
def _drawn(logits, options, count, seen):
    many = jnp.broadcast_to(logits, (count, logits.shape[-1]))
    many_seen = None if seen is None else jnp.broadcast_to(seen, many.shape)
    return choose(many, many_seen, keys_of(count), options)


def drawn(logits, options, count=20_000, seen=None):
    return np.asarray(_drawn(jnp.asarray(logits), options, count, seen))


def law_of(logits, seen, options, count=20_000):
    counts = np.bincount(drawn(logits, options, count, seen), minlength=np.shape(logits)[-1])
    return counts / count


def assert_drawn_by(frequencies, law, count=20_000):
    """Forbidden tokens are never drawn; Pearson's statistic is below its mean + 4 deviations."""
    assert not frequencies[law == 0].any()
    possible = law > 0
    freedom = possible.sum() - 1
    statistic = count * np.sum((frequencies - law)[possible] ** 2 / law[possible])
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 1e-3


OPTIONS = {
    "alone": {},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "all": {"top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_draws_follow_the_law_of_what_each_filter_left(options, temperature):
    row = np.array([2.0, 1.5, 1.0, 0.2, 0.0, -0.3, -1.0, -2.0])
    seen = np.array([True, False, False, True, False, True, False, False])
    law = row.copy()
    if "repetition_penalty" in options:
        law = np.where(seen, np.where(row > 0, row / 1.5, row * 1.5), row)
    law = law / temperature
    for keep in NUMBERS:
        if NAMES[keep] in options:
            stays = kept_by_definition(keep, options[NAMES[keep]], law)
            law = np.where([c in stays for c in range(8)], law, -np.inf)
    seen = jnp.asarray(seen) if "repetition_penalty" in options else None
    found = law_of(row[None].astype(np.float32), seen, {"temperature": temperature} | options)
    assert_drawn_by(found, np.array(softmax(law)))


ORDERS = {
    "top-k before top-p": ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.55}, {0}),
    "temperature before top-p": ([0.7, 0.2, 0.1], {"temperature": 5.0, "top_p": 0.6}, {0, 1}),
    "temperature before min-p": ([0.8, 0.1, 0.1], {"temperature": 5.0, "min_p": 0.5}, {0, 1, 2}),
    "top-p before min-p": ([0.4, 0.35, 0.15, 0.1], {"top_p": 0.8, "min_p": 0.3}, {0, 1, 2}),
}


@pytest.mark.parametrize(("law", "options", "possible"), ORDERS.values(), ids=ORDERS)
def test_each_filter_sees_what_the_former_left(law, options, possible):
    chosen = drawn(np.log([law]), {"temperature": 1.0} | options, 2000)
    assert set(chosen.tolist()) == possible


def test_the_penalty_comes_first_also_without_a_temperature():
    logits, seen = jnp.array([[0.0, 3.0, 2.9]]), jnp.array([[False, True, False]])
    assert choose(logits, None, None, {}).tolist() == [1]
    assert choose(logits, seen, None, {"repetition_penalty": 1.5}).tolist() == [2]
    options = {"repetition_penalty": 1.5, "temperature": 1.0, "top_k": 1}
    assert set(drawn(logits, options, 100, seen).tolist()) == {2}


def test_of_equal_tokens_the_most_probable_is_the_lowest_id():
    assert choose(jnp.array([[0.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), None, None, {}).tolist() == [1, 0]


def test_a_temperature_of_0_that_is_traced_takes_a_most_probable_token():
    chosen = drawn([[0.0, 1.0, 0.5, 1.0]], {"temperature": jnp.array(0.0), "top_p": 0.9}, 200)
    assert set(chosen.tolist()) == {1, 3}


def test_every_row_has_its_own_key():
    draw = jax.jit(functools.partial(choose, seen=None, options={"temperature": 1.0}))
    chosen = draw(jnp.zeros((6, 1000)), keys=keys_of(6))
    assert len(set(chosen.tolist())) > 3
    backwards = draw(jnp.zeros((6, 1000)), keys=keys_of(6)[::-1])
    np.testing.assert_array_equal(backwards, chosen[::-1])


# What is refused.

KEY = jax.random.key(0)
DRAW = {"temperature": 1.0, "key": KEY}
WRONG = {
    "top_p of 0": (ValueError, r"top_p must be above 0 and at most 1, got 0.0", {"top_p": 0.0}),
    "top_p above 1": (ValueError, r"top_p must be above 0 and at most 1, got 1.5", {"top_p": 1.5}),
    "top_p NaN": (ValueError, r"top_p must be .* got nan", {"top_p": float("nan")}),
    "top_p of several": (ValueError, r"top_p must be one number.*\(2,\)", {"top_p": np.ones(2)}),
    "top_p in words": (TypeError, r"top_p must be a real number, got '0.9'", {"top_p": "0.9"}),
    "top_p a flag": (TypeError, r"top_p must be a real number, got True", {"top_p": True}),
    "top_k of 0": (ValueError, r"top_k must be at least 1, got 0", {"top_k": 0}),
    "top_k below 0": (ValueError, r"top_k must be at least 1, got -1", {"top_k": -1}),
    "top_k and a half": (TypeError, r"top_k must be an integer, got 2.5", {"top_k": 2.5}),
    "top_k of several": (ValueError, r"top_k must be one number", {"top_k": np.array([1, 2])}),
    "min_p below 0": (ValueError, r"min_p must be from 0 to 1, got -0.1", {"min_p": -0.1}),
    "min_p above 1": (ValueError, r"min_p must be from 0 to 1, got 1.1", {"min_p": 1.1}),
    "penalty of 0": (
        ValueError, r"repetition_penalty must be positive .* got 0.0", {"repetition_penalty": 0.0},
    ),
    "penalty without end": (
        ValueError, r"repetition_penalty .* got inf", {"repetition_penalty": float("inf")},
    ),
    "temperature below 0": (ValueError, r"temperature must be 0 .* got -1", {"temperature": -1}),
    "temperature NaN": (
        ValueError, r"temperature must be 0 .* got nan", {"temperature": float("nan")},
    ),
    "temperature None": (TypeError, r"temperature must be a real num", {"temperature": None}),
    "no key": (ValueError, r"temperature = 1.0 draws tokens: pass key", {"key": None}),
    "a number as key": (TypeError, r"key must be one random key.* got 7", {"key": 7}),
    "several keys": (TypeError, r"key must be one random key", {"key": jax.random.split(KEY)}),
    "no temperature": (ValueError, r"key needs a temperature above 0", {"temperature": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "match", "options"), WRONG.values(), ids=WRONG)
def test_bad_options_are_named(error, match, options):
    with pytest.raises(error, match=match):
        sampling.checked(**(DRAW | options))


@pytest.mark.parametrize("option", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_filter_without_a_temperature_is_named(option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))} needs a temperature above 0"):
        sampling.checked(**option)


def test_filters_name_what_they_refuse():
    for keep, number in ((top_k, 0), (top_p, 0.0), (top_p, 1.5), (min_p, -0.1), (min_p, 1.5)):
        with pytest.raises(ValueError, match=rf"{NAMES[keep]} must be"):
            keep(jnp.zeros(3), number)
        with pytest.raises(TypeError, match="logits must be floating point, got int32"):
            keep(jnp.zeros(3, int), 1)
        assert np.isnan(jax.jit(keep)(jnp.zeros(3), number)).all()
    with pytest.raises(ValueError, match=r"seen must be \[..., C\] with .*C = 3, got shape \(4,\)"):
        repetition_penalty(jnp.zeros(3), jnp.zeros(4, bool), 1.5)


def test_options_in_range_are_allowed_and_no_others():
    good = {"temperature": 0.5, "top_k": 3, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.1}
    bad = {"temperature": -1.0, "top_k": 0, "top_p": 1.5, "min_p": -0.1, "repetition_penalty": 0.0}
    as_arrays = functools.partial(jax.tree.map, jnp.asarray)
    assert sampling.are_allowed(as_arrays(good)) and sampling.are_allowed({})
    for name in bad:
        assert not sampling.are_allowed(as_arrays(good | {name: bad[name]}))
