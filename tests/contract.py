"""The contract of attend: what every kernel that runs anywhere does; a new one is in `KERNELS`.

Numbers in section comments are those of the contract. Lengths and widths are distinct primes, so
that swapped axes fail. Ranks never promote in silence here. Beside this file lie the parts of the
contract on derivatives, precision and meshes.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores
from jattn.functional.block import PARTIAL, Block
from jattn.kernels.choose import KERNELS
from jattn.kernels.dropout import random_bits
from tests import oracle
from tests.cases import (
    ARRAY,
    BIAS,
    HEADS,
    LENGTHS,
    MASKS,
    MODIFIERS,
    PER_QUERY,
    SCORES,
    SELF_MASKS,
    SLOPES,
    SLOTS,
    TABLE,
    VARIANTS,
    B,
    H,
    S,
    T,
    V,
    assert_is_truth,
    loose,
    operands,
    run,
    score_cases,
    some,
)

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def test_every_kernel_is_held_to_the_contract():
    """But for one that needs its maker's hardware: see tests/kernels/test_cudnn.py."""
    assert {variant.split()[0] for variant in VARIANTS} | {"cudnn"} == set(KERNELS)


# 1. Truth


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("N", "K"), HEADS)
def test_every_score_is_the_loop(kernel, name, N, K, rng, x64):
    query, key, value = operands(rng, N, K)
    score, single = score_cases(N, rng)[name]
    assert_is_truth(
        run(kernel, query, key, value, score=score), oracle.attend(query, key, value, score=single)
    )


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_the_loop(kernel, name, rng, x64):
    query, key, value = operands(rng)
    mask, allowed = MASKS[name]
    truth = oracle.attend(query, key, value, score=oracle.scaled_dot_product, allowed=allowed)
    assert_is_truth(run(kernel, query, key, value, mask=mask), truth)


@pytest.mark.parametrize("name", SELF_MASKS)
def test_every_mask_of_self_attention_is_the_loop(kernel, name, rng, x64):
    query, key, value = operands(rng, T=SLOTS, S=SLOTS)
    mask, allowed = SELF_MASKS[name]
    truth = oracle.attend(query, key, value, score=oracle.scaled_dot_product, allowed=allowed)
    assert_is_truth(run(kernel, query, key, value, mask=mask), truth)


@pytest.mark.parametrize("name", MODIFIERS)
def test_every_modifier_is_the_loop(kernel, name, rng, x64):
    query, key, value = operands(rng)
    modifier, modify = MODIFIERS[name]
    truth = oracle.attend(query, key, value, score=oracle.scaled_dot_product, modify=modify)
    assert_is_truth(run(kernel, query, key, value, modifier=modifier), truth)


@pytest.mark.parametrize("per_example", [False, True])
def test_positions_move_what_masks_and_modifiers_see(kernel, per_example, rng, x64):
    query, key, value = operands(rng)
    q_pos, k_pos = rng.integers(0, 7, (B, T)), rng.integers(0, 7, (B, S))
    if not per_example:
        q_pos, k_pos = np.broadcast_to(q_pos[0], (B, T)), np.broadcast_to(k_pos[0], (B, S))
    given = (q_pos, k_pos) if per_example else (q_pos[0], k_pos[0])
    mask = (masks.causal() | masks.padding(LENGTHS)) & masks.mask_mod(lambda b, h, i, j: i != j + 1)
    truth = oracle.attend(
        query, key, value, score=oracle.scaled_dot_product,
        allowed=lambda b, h, t, s: (
            (k_pos[b, s] <= q_pos[b, t] or s < LENGTHS[b]) and q_pos[b, t] != k_pos[b, s] + 1
        ),
        modify=lambda x, b, h, t, s: (
            x - SLOPES[h] * abs(q_pos[b, t] - k_pos[b, s]) + BIAS[b, h, t, s]
        ),
    )  # fmt: skip
    modifier = (modifiers.alibi(SLOPES), modifiers.bias(BIAS))
    assert_is_truth(
        run(kernel, query, key, value, mask=mask, modifier=modifier, positions=given), truth
    )


def test_gradients_are_the_slopes_of_the_loop(kernel, rng, x64):
    query, key, value = operands(rng, N=2, K=1, H=2, V=2)
    weight, table, cotangent = (
        rng.standard_normal(2),
        rng.standard_normal(13),
        rng.standard_normal((B, T, 2, 2)),
    )

    def loss(query, key, value, weight, table):
        output, lse = jattn.attend(
            query, key, value,
            score=functools.partial(scores.additive, weight=weight), mask=masks.causal(1),
            modifier=modifiers.relative_bias(table), implementation=kernel, return_lse=True,
        )  # fmt: skip
        return (output * cotangent).sum() + jnp.sin(lse).sum()

    def truth(query, key, value, weight, table):
        output, lse, _ = oracle.attend(
            query, key, value,
            score=lambda q, k, h: float(np.tanh(q + k) @ weight),
            allowed=lambda b, h, t, s: s <= t + 1,
            modify=lambda x, b, h, t, s: x + table[t - s + 6],
        )  # fmt: skip
        return (output * cotangent).sum() + np.sin(lse).sum()

    arguments = [query, key, value, weight, table]
    came = jax.jit(jax.grad(loss, argnums=range(5)))(
        *(jnp.asarray(argument) for argument in arguments)
    )
    for index, gradient in enumerate(came):
        slopes = oracle.numerical_gradient(
            lambda moved, index=index: truth(*arguments[:index], moved, *arguments[index + 1 :]),
            arguments[index],
        )
        np.testing.assert_allclose(gradient, slopes, rtol=1e-7, atol=2e-9)  # see the oracle's step


def test_gradients_through_everything_at_once_are_those_of_the_specification(kernel, rng, x64):
    """Scores, modifiers, masks, positions, dropout and lse together.

    The parts are held to loops above.
    """
    query, key, value = operands(rng)
    mask = masks.padding(PER_QUERY) | masks.mask_mod(lambda b, h, i, j: i == j)
    positions = rng.integers(0, 7, (B, T)), rng.integers(0, 7, (B, S))
    cotangents = rng.standard_normal((B, T, 6, V)), rng.standard_normal((B, T, 6))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, query, key, value, weight, table, slopes, bias):
        def results(*operands):
            query, key, value, weight, table, slopes, bias = operands
            modifier = (
                modifiers.alibi(slopes),
                modifiers.bias(bias),
                modifiers.relative_bias(table),
            )
            output, lse = jattn.attend(
                query, key, value,
                score=functools.partial(scores.additive, weight=weight), mask=mask,
                modifier=(*modifier, modifiers.soft_cap(2.0)), positions=positions,
                dropout_rate=0.3, dropout_key=jax.random.key(1),
                implementation=implementation, return_lse=True,
            )  # fmt: skip
            return output, jnp.where(jnp.isneginf(lse), 0, lse)

        return jax.vjp(results, query, key, value, weight, table, slopes, bias)[1](cotangents)

    parameters = rng.standard_normal((6, H)), TABLE, SLOPES, BIAS[:, :1]
    came, expected = (gradients(name, query, key, value, *parameters) for name in (kernel, "dense"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), came, expected
    )


# 10. What is forbidden never reaches a gradient of what a modifier captures

FAR = (np.arange(T), np.where(np.arange(S) == 6, 1000, np.arange(S)))  # beyond any table

SINGULAR = {
    "a table beyond its end, under a cap": (
        masks.causal(),
        lambda x: (
            modifiers.alibi(x[:6]),
            modifiers.relative_bias(x[:6, None] * TABLE),
            modifiers.soft_cap(5.0),
        ),
        lambda b, h, t, s: s <= t,
        lambda y, x, b, h, t, s: (
            5 * math.tanh((y - x[h] * (t - s) + x[h] * TABLE[h, t - s + 6]) / 5)
        ),
    ),
    "a logarithm of zero and below": (
        masks.causal(),
        lambda x: loose(lambda y, b, h, i, j: y - x[h] * jnp.log(1.0 + (i - j))),
        lambda b, h, t, s: s <= t,
        lambda y, x, b, h, t, s: y - x[h] * math.log(t - s + 1),
    ),
    "a division by zero behind a bias": (
        masks.no_self(),
        lambda x: (
            modifiers.bias(x[None, :6, None, None] * BIAS),
            loose(lambda y, b, h, i, j: y / (i - j)),
        ),
        lambda b, h, t, s: t != s,
        lambda y, x, b, h, t, s: (y + x[h] * BIAS[b, h, t, s]) / (t - s),
    ),
    "a logarithm of the score": (
        masks.padding(LENGTHS),
        lambda x: loose(lambda y, b, h, i, j: x[h] * jnp.log(y)),
        lambda b, h, t, s: s < LENGTHS[b],
        lambda y, x, b, h, t, s: x[h] * math.log(y),
    ),
    "where an example sees nothing": (
        masks.causal() & masks.padding(np.array([0, 7])),
        lambda x: loose(lambda y, b, h, i, j: y - x[h] * jnp.log(1.0 + (i - j))),
        lambda b, h, t, s: b == 1 and s <= t,
        lambda y, x, b, h, t, s: y - x[h] * math.log(t - s + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGULAR)
def test_gradients_where_a_modifier_is_singular_at_forbidden_entries(kernel, name, rng, x64):
    """Finite, and the slopes of the loop, which never evaluates a modifier there."""
    query, key, value = (np.abs(array) for array in operands(rng))
    parameter, cotangent = rng.uniform(0.5, 1.0, 6), rng.standard_normal((B, T, 6, V))
    mask, modifier, allowed, modify = SINGULAR[name]
    positions = FAR if "table" in name else None

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradients(parameter, query, key, value):
        options = {"mask": mask, "modifier": modifier(parameter), "positions": positions}
        output = jattn.attend(query, key, value, implementation=kernel, **options)
        return (output * cotangent).sum()

    came, *others = gradients(jnp.asarray(parameter), query, key, value)
    assert all(jnp.isfinite(gradient).all() for gradient in others)

    def truth(parameter):
        output, *_ = oracle.attend(
            query, key, value, score=oracle.scaled_dot_product,
            allowed=(lambda b, h, t, s: s <= t and s != 6) if positions else allowed,
            modify=lambda y, b, h, t, s: modify(y, parameter, b, h, t, s),
        )  # fmt: skip
        return (output * cotangent).sum()

    slopes = oracle.numerical_gradient(truth, parameter)
    np.testing.assert_allclose(came, slopes, rtol=1e-7, atol=2e-9)  # see the oracle's step


# 2. and 3. Empty and hidden rows


def test_a_query_with_no_allowed_key_gives_zero_and_zero_gradients(kernel, rng, x64):
    query, key, value = operands(rng)
    mask = masks.padding(np.array([0, 3]))

    def loss(*operands):
        output, lse = jattn.attend(*operands, mask=mask, implementation=kernel, return_lse=True)
        return output.sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum(), (output, lse)

    gradients, (output, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
        query, key, value
    )
    assert (output[0] == 0).all() and jnp.isneginf(lse[0]).all() and jnp.isfinite(lse[1]).all()
    for gradient in gradients:
        assert jnp.isfinite(gradient).all() and (gradient[0] == 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_hidden_rows_reach_neither_output_nor_gradients(kernel, name, rng, x64):
    query, key, value = operands(rng)
    score, _ = score_cases(6, rng)[name]
    hidden_query = np.arange(T) == 1
    mask = masks.padding(LENGTHS) & masks.from_array(~hidden_query[:, None])
    cotangents = (rng.standard_normal((B, T, 6, V)), rng.standard_normal((B, T, 6)))

    @jax.jit
    def results(*operands):
        options = {"score": score, "mask": mask, "implementation": kernel, "return_lse": True}
        outputs, pull = jax.vjp(functools.partial(jattn.attend, **options), *operands)
        return outputs, pull(cotangents)

    clean = results(query, key, value)
    for poison in (np.nan, np.inf):
        query[:, hidden_query] = poison
        for b, length in enumerate(LENGTHS):
            key[b, length:] = value[b, length:] = poison
        jax.tree.map(np.testing.assert_array_equal, results(query, key, value), clean)


@pytest.mark.parametrize("low", [-1e4, -1e9, float(np.finfo(np.float32).min)])
def test_rows_of_large_negative_scores_have_their_gradients(kernel, low, rng):
    """A finite bias in the place of a mask.

    Where all scores of a row have it, they share the weight as without it.
    """
    query, key, value = operands(rng, dtype=np.float32)
    bias = jnp.zeros((1, 1, T, 1)).at[:, :, :2].set(low)

    def total(value, query):
        return jattn.attend(
            query, key, value, modifier=modifiers.bias(bias), implementation=kernel
        )[:, :2].sum()

    gradient = jax.jit(jax.grad(total))(value, np.zeros_like(query))
    # 2 rows, 3 heads a key, each 1 / S
    np.testing.assert_allclose(gradient, np.full_like(value, 2 * 3 / S), rtol=1e-5)


def test_a_query_that_is_nan_reaches_no_key_that_it_may_not_see(kernel, rng, x64):
    query, key, value = operands(rng)
    query[:, 1] = np.nan
    allowed = np.arange(S) < 3

    def total(key, value):
        return jattn.attend(
            query, key, value, mask=jnp.asarray(allowed[None, None, None]), implementation=kernel
        ).sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(key, value):
        assert (np.asarray(gradient)[:, 3:] == 0).all()


@pytest.mark.parametrize("poisoned", ["a visible query", "a cotangent"])
def test_nan_reaches_no_value_that_nobody_may_see(kernel, poisoned, rng, x64):
    query, key, value = operands(rng)
    cotangent = rng.standard_normal((B, T, 6, V))
    (query if poisoned == "a visible query" else cotangent)[:, 1] = np.nan
    attend = functools.partial(jattn.attend, mask=masks.padding(LENGTHS), implementation=kernel)
    *_, gradient = jax.jit(lambda c, *x: jax.vjp(attend, *x)[1](c))(cotangent, query, key, value)
    for b, length in enumerate(LENGTHS):
        assert (np.asarray(gradient)[b, length:] == 0).all()


def test_a_finite_number_never_affects_a_query_that_may_not_see_it(kernel, rng, x64):
    """However large: a forbidden score of 1e300 and a forbidden value of 1e300 change no bit."""
    query, key, value = operands(rng)
    attend = jax.jit(
        functools.partial(jattn.attend, mask=masks.causal(), implementation=kernel, return_lse=True)
    )
    clean = attend(query, key, value)
    key[:, 4], value[:, 4] = 1e300, 1e300
    for came, expected in zip(attend(query, key, value), clean, strict=True):
        np.testing.assert_array_equal(came[:, :4], expected[:, :4])


def test_values_near_the_end_of_the_range_have_their_mean(kernel, rng):
    query, key, _ = operands(rng, dtype=np.float32)
    value = np.full((B, S, 2, V), 3e38, np.float32)
    output = jattn.attend(query, key, value, implementation=kernel)
    np.testing.assert_allclose(output, np.full_like(output, 3e38), rtol=1e-6)


def test_a_score_of_minus_infinity_is_as_good_as_forbidden(kernel, rng, x64):
    """A kernel regression whose weights all underflow knows no value: an empty row."""
    query, key, value = operands(rng)
    hidden = rng.random((T, S)) < 0.5
    hidden[0] = True
    by_score = jattn.attend(
        query, key, value, modifier=modifiers.bias(np.where(hidden, -np.inf, 0.0)[None]),
        implementation=kernel, return_lse=True,
    )  # fmt: skip
    by_mask = jattn.attend(query, key, value, mask=~hidden, implementation=kernel, return_lse=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), by_score, by_mask)
    assert (by_score[0][:, 0] == 0).all() and jnp.isneginf(by_score[1][:, 0]).all()


@pytest.mark.parametrize("check", ["jax_debug_infs", "jax_debug_nans"])
@pytest.mark.parametrize("jit", [True, False])
def test_no_infinity_and_no_nan_where_the_results_hold_none(kernel, check, jit, rng):
    query, key, value = operands(rng, dtype=np.float32)

    def loss(*arrays):
        return jnp.sin(jattn.attend(*arrays, mask=masks.causal(), implementation=kernel)).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    value_and_flag = getattr(jax.config, check)
    jax.config.update(check, True)
    try:
        (jax.jit(gradient) if jit else gradient)(query, key, value)
    finally:
        jax.config.update(check, value_and_flag)


def test_no_traced_array_outlives_its_trace(kernel, rng, checking_leaks):
    query, key, value = operands(rng, dtype=np.float32)

    def total(query, lengths, positions, slope):
        options = {
            "mask": masks.padding(lengths),
            "positions": (positions[:T], positions),
            "implementation": kernel,
        }

        def modifier(score, b, h, i, j):
            return score - slope * jnp.abs(i - j).astype(score.dtype)

        return jattn.attend(query, key, value, modifier=modifier, **options).sum()

    jax.jit(jax.grad(total, argnums=(0, 3)))(
        query, jnp.asarray(LENGTHS), jnp.arange(S), jnp.float32(0.5)
    )


@pytest.mark.parametrize(
    "mask", [masks.padding(np.array([0, 3])), masks.padding(PER_QUERY)], ids=["examples", "rows"]
)
def test_a_nan_cotangent_of_an_empty_row_reaches_nothing(kernel, mask, rng, x64):
    query, key, value = operands(rng)

    def loss(*operands):
        output = jattn.attend(*operands, mask=mask, implementation=kernel)
        return jnp.sqrt(jnp.square(output).sum((-2, -1))).sum()  # its slope at zero is NaN

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


# 4. Any lengths


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 7), (5, 1), (0, 7), (5, 0), (13, 17)])
def test_any_lengths(kernel, T, S, rng, x64):
    query, key, value = operands(rng, T=T, S=S)
    truth = oracle.attend(
        query, key, value, score=oracle.scaled_dot_product, allowed=lambda b, h, t, s: s <= t
    )
    assert_is_truth(run(kernel, query, key, value, mask=masks.causal()), truth)


def test_zero_lengths_with_a_mask_and_a_modifier(kernel, rng, x64):
    query, key, value = operands(rng)
    options = {"mask": masks.causal(), "modifier": loose(lambda x, b, h, i, j: x * 2)}
    attend = functools.partial(jattn.attend, implementation=kernel, **options)
    assert (attend(query, key[:, :0], value[:, :0]) == 0).all()
    assert attend(query[:, :0], key, value).shape == (B, 0, 6, V)
    gradient = jax.grad(lambda q: attend(q, key[0], value[0]).sum())
    assert jax.vmap(gradient)(query[:0]).shape == (0, T, 6, 3)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_any_leading_axes(kernel, lead, rng, x64):
    query, key, value = operands(rng, B=math.prod(lead))
    truth = oracle.attend(
        query,
        key,
        value,
        score=oracle.scaled_dot_product,
        modify=lambda x, b, h, t, s: x * (1 + b) + h,
    )
    shaped = [array.reshape(*lead, *array.shape[1:]) for array in (query, key, value)]
    came = run(kernel, *shaped, modifier=loose(lambda x, b, h, i, j: x * (1 + b) + h))
    assert_is_truth([a.reshape(t.shape) for a, t in zip(came, truth, strict=False)], truth)


# 5. Dtypes; errors are in contract_precision.py


def test_float64_stays_float64(kernel, rng, x64):
    assert {array.dtype for array in run(kernel, *operands(rng))} == {jnp.dtype("float64")}


def test_a_score_wider_than_the_operands_keeps_its_precision(kernel, rng, x64):
    query, key, value = operands(rng, dtype=np.float32)
    weight = rng.standard_normal(H)

    def score(query, key):
        return jnp.einsum("...th,...sh,h->...ts", *(x.astype(float) for x in (query, key)), weight)

    output, lse = jattn.attend(
        query, key, value, score=score, implementation=kernel, return_lse=True
    )
    truth, truth_lse, _ = oracle.attend(
        query, key, value, score=lambda q, k, h: float(q * k @ weight)
    )
    assert (output.dtype, lse.dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(output, truth, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, truth_lse, rtol=1e-12)


def test_mixed_dtypes_follow_jax_promotion(kernel, rng):
    query, key, value = operands(rng, dtype=np.float32)
    with jax.numpy_dtype_promotion("standard"):
        output = jattn.attend(query, jnp.asarray(key, jnp.bfloat16), value, implementation=kernel)
    assert output.dtype == jnp.float32


# 7. Transformations; meshes are in contract_meshes.py, derivatives in contract_derivatives.py


def test_without_jit_it_is_the_same(kernel, rng, x64):
    query, key, value = operands(rng)
    attend = functools.partial(jattn.attend, mask=masks.causal(1), implementation=kernel)
    with jax.disable_jit():
        came = attend(query, key, value)
    np.testing.assert_allclose(came, jax.jit(attend)(query, key, value), rtol=1e-12)


def test_bounds_of_a_mask_may_be_plain_numbers(kernel, rng, x64):
    query, key, value = operands(rng)
    lifted = masks.mask_mod(lambda b, h, i, j: j <= i, bounds=lambda *ends: PARTIAL)
    came, expected = (
        jattn.attend(query, key, value, mask=mask, implementation=kernel)
        for mask in (lifted, masks.causal())
    )
    np.testing.assert_allclose(came, expected, rtol=1e-12)


def test_jit_vmap_and_a_loop_agree(kernel, rng, x64):
    query, key, value = operands(rng)
    attend = functools.partial(jattn.attend, implementation=kernel)

    def one(query, key, value, length):
        return attend(query, key, value, mask=masks.padding(length) & masks.causal(1))

    batched = jax.jit(attend)(query, key, value, mask=masks.padding(LENGTHS) & masks.causal(1))
    mapped = jax.jit(jax.vmap(one))(query, key, value, LENGTHS)
    single = jax.jit(one)
    looped = jnp.stack(
        [single(*example) for example in zip(query, key, value, LENGTHS, strict=True)]
    )
    np.testing.assert_allclose(mapped, batched, rtol=1e-12)
    np.testing.assert_allclose(looped, batched, rtol=1e-12)


@pytest.mark.parametrize(
    "mapped", some(["query", "key", "value", "length", "slopes"], ["query", "key", "slopes"])
)
def test_vmap_over_one_operand_with_gradients(kernel, mapped, rng, x64):
    query, key, value = operands(rng, B=1)
    shared = {
        "query": query[0],
        "key": key[0],
        "value": value[0],
        "length": np.int32(4),
        "slopes": SLOPES,
    }
    batch = {**shared, mapped: np.stack([shared[mapped], shared[mapped] + 1, shared[mapped] - 1])}

    def loss(query, key, value, length, slopes):
        mask, modifier = (
            masks.padding(length),
            (modifiers.alibi(slopes), loose(lambda x, b, h, i, j: x + slopes[h] * length)),
        )
        return jnp.sin(
            jattn.attend(query, key, value, mask=mask, modifier=modifier, implementation=kernel)
        ).sum()

    def gradient(*arguments):
        return jax.grad(loss, argnums=(0, 1, 2, 4))(*arguments)

    in_axes = tuple(0 if name == mapped else None for name in shared)
    together = jax.jit(jax.vmap(gradient, in_axes))(*batch.values())
    one = jax.jit(gradient)
    for index in range(3):
        single = one(*({**shared, mapped: batch[mapped][index]}).values())
        jax.tree.map(
            lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-11, atol=1e-13),
            together,
            single,
        )


def test_nested_vmap(kernel, rng, x64):
    query, key, value = operands(rng, B=6)
    lengths = rng.integers(1, S + 1, 6)

    def one(query, key, value, length):
        return jattn.attend(query, key, value, mask=masks.padding(length), implementation=kernel)

    shaped = [array.reshape(2, 3, *array.shape[1:]) for array in (query, key, value, lengths)]
    nested = jax.jit(jax.vmap(jax.vmap(one)))(*shaped).reshape(6, T, 6, V)
    flat = jattn.attend(query, key, value, mask=masks.padding(lengths), implementation=kernel)
    np.testing.assert_allclose(nested, flat, rtol=1e-12)


def test_captured_float_and_integer_tracers(kernel, rng, x64):
    """Callables that close over traced values.

    Under grad of jit, jit of grad, grad of vmap, scan and checkpoint.
    """
    query, key, value = operands(rng, B=1)
    query, key, value = query[0], key[0], value[0]

    def loss(slope, length, query):
        return jnp.sin(
            jattn.attend(
                query, key, value,
                mask=loose(lambda b, h, i, j: j < length),
                modifier=loose(lambda x, b, h, i, j: x * slope + slope * (i - j)),
                score=lambda q, k: jnp.einsum("...th,...sh->...ts", q, k) * slope,
                implementation=kernel,
            )
        ).sum()  # fmt: skip

    slopes, lengths = np.array([0.3, 0.7, 1.1]), np.array([1, 4, 7])
    gradient = jax.jit(jax.grad(loss, argnums=(0, 2)))
    expected = [
        gradient(slope, length, query) for slope, length in zip(slopes, lengths, strict=True)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    jitted = jax.jit(loss)
    for transformed in (
        jax.vmap(jax.jit(gradient), (0, 0, None)),
        jax.vmap(jax.grad(jitted, argnums=(0, 2)), (0, 0, None)),
        jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 2)), (0, 0, None)),
        lambda s, n, q: jax.lax.scan(lambda c, x: (c, gradient(*x, q)), 0, (s, n))[1],
        lambda s, n, q: jax.lax.map(lambda x: gradient(*x, q), (s, n)),
    ):
        came = jax.jit(transformed)(slopes, lengths, query)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), came, stacked
        )


def test_a_checkpoint_policy_can_keep_output_and_lse(kernel, rng, capsys):
    """Of all that is computed, these alone: with them the backward pass starts."""
    query, key, value = operands(rng, dtype=np.float32)

    def loss(query):
        output, lse = jattn.attend(query, key, value, implementation=kernel, return_lse=True)
        return jnp.sin(output).sum() + jnp.sin(lse).sum()

    def saved(policy):
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(loss, policy=policy), query)
        lines = capsys.readouterr().out.splitlines()
        return [
            line for line in lines if "from the argument" not in line and "constant" not in line
        ]

    policies = jax.checkpoint_policies
    assert saved(policies.nothing_saveable) == []
    kept = saved(policies.save_only_these_names("attend_output", "attend_lse"))
    sizes = [
        math.prod(map(int, line[line.index("[") + 1 : line.index("]")].split(","))) for line in kept
    ]
    assert sorted(set(sizes)) == [B * T * 6, B * T * 6 * V] and len(sizes) <= 4


def test_one_trace_serves_many_calls(kernel, rng):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attend(query, key, value, mask):
        return jattn.attend(query, key, value, mask=mask, implementation=kernel)

    for lengths in (LENGTHS, LENGTHS - 1, LENGTHS - 2):
        attend(*operands(rng, dtype=np.float32), masks.padding(lengths) & masks.causal())


# 8. Dropout


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_dropout_drops_what_the_shared_pattern_says(kernel, impl, rng, x64):
    """Against the oracle's weights and the one definition of the bits, whatever the blocks."""
    query, key, value = operands(rng, T=13, S=17)
    random_key = jax.random.key(3, impl=impl)
    _, _, weights = oracle.attend(query, key, value, score=oracle.scaled_dot_product)
    words = jax.random.key_data(random_key)
    bits = np.asarray(random_bits(words, Block((B,), 6, (0, 13), (0, 17))))
    dropped = np.where(bits >= 0.3 * 2**32, weights / 0.7, 0)
    truth = np.einsum("bnts,bsnv->btnv", dropped, np.repeat(value, 3, axis=2))
    options = {"dropout_rate": 0.3, "dropout_key": random_key, "implementation": kernel}
    output = jattn.attend(query, key, value, **options)
    np.testing.assert_allclose(output, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_dropout_under_vmap_over_keys_is_that_of_a_loop(kernel, impl, rng, x64):
    query, key, value = (array[0] for array in operands(rng, B=1))

    def one(random_key):
        options = {"dropout_rate": 0.5, "dropout_key": random_key, "implementation": kernel}
        return jattn.attend(query, key, value, **options)

    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    looped = jnp.stack([one(random_key) for random_key in keys])
    np.testing.assert_allclose(jax.vmap(one)(keys), looped, rtol=1e-12)
    assert (looped[0] != looped[1]).any()


# 12. Reductions


def attend_and_gradients(kernel, query, key, value, **options):
    def loss(*operands):
        return jnp.sin(jattn.attend(*operands, implementation=kernel, **options)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)


@pytest.mark.parametrize(
    "mask",
    [masks.sliding_window(T + S, T + S), masks.from_array(np.ones((1, 1), bool)), masks.causal(S)],
    ids=repr,
)
def test_a_mask_that_allows_all_is_no_mask(kernel, mask, rng, x64):
    arrays = operands(rng)
    came, plain = (attend_and_gradients(kernel, *arrays, mask=each) for each in (mask, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), came, plain)


def test_grouped_heads_are_repeated_heads(kernel, rng, x64):
    query, key, value = operands(rng, 6, 2)
    repeated = [np.repeat(array, 3, axis=-2) for array in (key, value)]
    grouped = jattn.attend(query, key, value, implementation=kernel)
    np.testing.assert_allclose(
        grouped, jattn.attend(query, *repeated, implementation=kernel), rtol=1e-12
    )


def test_merging_the_halves_of_the_keys_is_the_whole(kernel, rng, x64):
    query, key, value = operands(rng)
    mask = masks.from_array(ARRAY)

    def halves(query, key, value):
        parts = []
        for start, stop in ((0, 3), (3, 7)):
            part = masks.from_array(ARRAY[..., start:stop])
            rows = key[:, start:stop], value[:, start:stop]
            parts.append(
                jattn.attend(query, *rows, mask=part, implementation=kernel, return_lse=True)
            )
        return jattn.merge_partials(parts)

    def whole(query, key, value):
        return jattn.attend(query, key, value, mask=mask, implementation=kernel, return_lse=True)

    cotangents = (rng.standard_normal((B, T, 6, V)), rng.standard_normal((B, T, 6)))

    def results(function, *operands):
        outputs, pull = jax.vjp(function, *operands)
        return outputs, pull(cotangents)

    merged, plain = (
        jax.jit(functools.partial(results, function))(query, key, value)
        for function in (halves, whole)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), merged, plain
    )


def test_a_constant_score_is_average_pooling(kernel, rng, x64):
    query, key, value = operands(rng, 3, 3)
    output = jattn.attend(query, key, value, score=scores.constant, implementation=kernel)
    np.testing.assert_allclose(
        output, np.broadcast_to(value.mean(1, keepdims=True), output.shape), rtol=1e-12
    )
