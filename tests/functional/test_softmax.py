"""The masked softmax against loops, at its edges, and through every kind of derivative."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import masked_softmax
from jattn.functional.softmax import softmax_and_logsumexp
from tests import oracle

B, T, S = 2, 3, 5


def loop(scores, allowed):
    """Weights `[..., S]` and log-sum-exp `[...]` over the allowed entries, row by row."""
    allowed = np.broadcast_to(allowed, scores.shape)
    weights, lse = np.zeros(scores.shape), np.full(scores.shape[:-1], -np.inf)
    for row in np.ndindex(scores.shape[:-1]):
        entries = [s for s in range(scores.shape[-1]) if allowed[(*row, s)]]
        if entries:
            highest = max(scores[row][s] for s in entries)
            total = math.fsum(math.exp(scores[row][s] - highest) for s in entries)
            lse[row] = highest + math.log(total)
            for s in entries:
                weights[(*row, s)] = math.exp(scores[row][s] - highest) / total
    return weights, lse


@pytest.mark.parametrize(
    "lengths",
    [np.array([0, 3]), np.array([[0, 1, 5], [5, 2, 0]]), np.array([5, 5], np.uint8)],
    ids=["B", "BT", "all"],
)
def test_lengths_are_the_loop(lengths, rng, x64):
    scores = 3 * rng.standard_normal((B, T, S))
    per_row = lengths if lengths.ndim == 2 else lengths[:, None]
    weights, _ = loop(scores, np.arange(S) < per_row[..., None])
    np.testing.assert_allclose(masked_softmax(scores, lengths=lengths), weights, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(B, T, S), (1, T, S), (B, 1, S), (T, 1), (S,), (1,), ()])
def test_boolean_masks_broadcast_and_combine_with_lengths(shape, rng, x64):
    scores, mask, lengths = (
        rng.standard_normal((B, T, S)),
        rng.random(shape) < 0.6,
        np.array([4, 2]),
    )
    within = np.arange(S) < lengths[:, None, None]
    for given, allowed in (({}, mask), ({"lengths": lengths}, mask & within)):
        weights, _ = loop(scores, allowed)
        np.testing.assert_allclose(
            masked_softmax(scores, mask, **given), weights, rtol=1e-13, atol=0
        )


def test_scores_of_any_rank(rng, x64):
    for shape in [(S,), (T, S), (2, 3, 5, 7)]:
        scores = rng.standard_normal(shape)
        np.testing.assert_allclose(masked_softmax(scores), loop(scores, True)[0], rtol=1e-13)
    np.testing.assert_allclose(
        masked_softmax(scores[0, 0], lengths=np.array(3)), loop(scores[0, 0], np.arange(7) < 3)[0]
    )
    assert masked_softmax(jnp.zeros((2, 0))).shape == (2, 0)


def test_logsumexp_is_the_loop(rng, x64):
    scores, mask = 50 * rng.standard_normal((B, T, S)), rng.random((B, T, S)) < 0.4
    mask[0, 1] = False
    weights, lse = softmax_and_logsumexp(jnp.asarray(scores), jnp.asarray(mask))
    for came, truth in zip((weights, lse), loop(scores, mask), strict=True):
        np.testing.assert_allclose(came, truth, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shift", [-1e30, -700.0, 700.0, 1e30])
def test_huge_scores_neither_overflow_nor_vanish(shift):
    weights = masked_softmax(jnp.array([[shift, shift]], jnp.float32))
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_forbidden_entries_may_hold_anything(poison, rng, x64):
    scores, mask = rng.standard_normal((T, S)), rng.random((T, S)) < 0.5
    mask[1] = False
    poisoned = np.where(mask, scores, poison)

    def loss(scores):
        weights, lse = softmax_and_logsumexp(scores, jnp.asarray(mask))
        return jnp.sin(weights).sum() + jnp.where(jnp.isneginf(lse), 0, jnp.sin(lse)).sum()

    np.testing.assert_array_equal(masked_softmax(poisoned, mask), masked_softmax(scores, mask))
    gradient = jax.grad(loss)(poisoned)
    np.testing.assert_array_equal(gradient, jax.grad(loss)(scores))
    assert (gradient[~mask] == 0).all() and (gradient[1] == 0).all()


def test_rows_of_minus_infinity_are_empty_rows():
    """User modifiers of FlexAttention write −inf themselves; no mask is involved then."""
    scores = jnp.array([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf]])
    np.testing.assert_array_equal(masked_softmax(scores), [[0, 0], [1, 0]])
    gradient = jax.grad(lambda scores: jnp.sin(masked_softmax(scores)).sum())(scores)
    np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


def test_a_nan_that_may_be_attended_to_is_not_hidden():
    weights = masked_softmax(jnp.array([[jnp.nan, 0.0], [0.0, 0.0]]))
    assert jnp.isnan(weights[0]).all() and (weights[1] == 0.5).all()


def test_derivatives_are_those_of_the_closed_form(rng, x64):
    """∂w_i/∂x_j = w_i (δ_ij − w_j) and its own derivative, forward and reverse.

    A masked entry is among them.
    """
    scores, mask = rng.standard_normal(S), np.array([True, True, False, True, True])
    w, _ = loop(scores[None], mask)
    w, eye = w[0], np.eye(S)
    jacobian = w[:, None] * (eye - w)
    hessian = w[:, None, None] * (
        (eye[:, :, None] - w[:, None]) * (eye[:, None, :] - w[None, None, :])
        - (w[:, None] * (eye - w))[None]
    )

    def weights(scores):
        return masked_softmax(scores, mask)

    for first in (jax.jacfwd(weights), jax.jacrev(weights)):
        np.testing.assert_allclose(jax.jit(first)(scores), jacobian, rtol=1e-12, atol=1e-15)
    for second in (jax.hessian(weights), jax.jacrev(jax.jacrev(weights))):
        np.testing.assert_allclose(jax.jit(second)(scores), hessian, rtol=1e-12, atol=1e-15)


def test_second_order_is_finite_at_empty_rows(x64):
    def loss(scores):
        weights, lse = softmax_and_logsumexp(scores, jnp.zeros((2, 3), bool))
        return jnp.sin(weights).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    np.testing.assert_array_equal(
        jax.jit(jax.hessian(loss))(jnp.full((2, 3), jnp.nan)), np.zeros((2, 3, 2, 3))
    )


def test_gradient_of_logsumexp_is_the_slope_of_the_loop(rng, x64):
    scores, mask = rng.standard_normal((T, S)), rng.random((T, S)) < 0.7
    slopes = oracle.numerical_gradient(lambda moved: np.sin(loop(moved, mask)[1]).sum(), scores)
    gradient = jax.grad(
        lambda scores: jnp.sin(softmax_and_logsumexp(scores, jnp.asarray(mask))[1]).sum()
    )(scores)
    # Central differences: ~1e-10
    np.testing.assert_allclose(gradient, slopes, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_float32(dtype, rng):
    """With 8191 equal scores, a float16 or bfloat16 sum would stall at 2048 or 256."""
    scores = jnp.asarray(rng.standard_normal((T, 8191)), dtype)
    weights = masked_softmax(scores)
    truth, _ = loop(np.asarray(scores, np.float64), True)
    assert weights.dtype == dtype
    info = jnp.finfo(dtype)
    half_ulp = 0.5001 * float(info.eps) * truth + float(info.smallest_subnormal) / 2
    assert (np.abs(np.asarray(weights, np.float64) - truth) <= half_ulp + 1e-6 * truth).all()
    assert softmax_and_logsumexp(scores, None)[1].dtype == jnp.float32


def test_jit_vmap_and_a_loop_agree(rng, x64):
    scores, lengths = rng.standard_normal((B, T, S)), np.array([0, 3])
    whole = masked_softmax(scores, lengths=lengths)
    mapped = jax.jit(jax.vmap(lambda scores, length: masked_softmax(scores, lengths=length)))(
        scores, lengths
    )
    looped = [
        masked_softmax(one, lengths=np.array(length))
        for one, length in zip(scores, lengths, strict=True)
    ]
    np.testing.assert_allclose(mapped, whole, rtol=1e-14)
    np.testing.assert_allclose(jnp.stack(looped), whole, rtol=1e-14)


@pytest.mark.parametrize(
    ("error", "match", "scores", "options"),
    [
        (TypeError, "scores must be floating point, got int32", np.zeros((2, 3), np.int32), {}),
        (
            TypeError,
            "scores must be floating point, got complex64",
            np.zeros((2, 3), np.complex64),
            {},
        ),
        (
            TypeError,
            "mask must be boolean.*got float32",
            np.zeros((2, 3)),
            {"mask": np.ones((2, 3), np.float32)},
        ),
        (
            TypeError,
            "mask must be boolean.*got int32",
            np.zeros((2, 3)),
            {"mask": np.ones((2, 3), np.int32)},
        ),
        (
            ValueError,
            r"mask must broadcast.*\(2, 3\), got shape \(3, 2\)",
            np.zeros((2, 3)),
            {"mask": np.ones((3, 2), bool)},
        ),
        (
            ValueError,
            r"mask must broadcast.*got shape \(7, 2, 3\)",
            np.zeros((2, 3)),
            {"mask": np.ones((7, 2, 3), bool)},
        ),
        (
            TypeError,
            "lengths must be integers, got float32",
            np.zeros((2, 3, 5)),
            {"lengths": np.ones(2, np.float32)},
        ),
        (
            TypeError,
            "lengths must be integers, got bool",
            np.zeros((2, 3, 5)),
            {"lengths": np.ones(2, bool)},
        ),
        (
            ValueError,
            r"lengths must be .*\(2,\).*\(2, 3\), got \(1,\)",
            np.zeros((2, 3, 5)),
            {"lengths": np.array([1])},
        ),
        (ValueError, r"lengths must be .*got \(\)", np.zeros((2, 3, 5)), {"lengths": 1}),
        (
            ValueError,
            r"lengths must be .*got \(3, 2\)",
            np.zeros((2, 3, 5)),
            {"lengths": np.ones((3, 2), int)},
        ),
        (
            ValueError,
            "lengths must lie in 0 … 5 .*got 6",
            np.zeros((2, 3, 5)),
            {"lengths": np.array([0, 6])},
        ),
        (
            ValueError,
            "lengths must lie in 0 … 5 .*got -1",
            np.zeros((2, 3, 5)),
            {"lengths": np.array([-1, 6])},
        ),
        (ValueError, "scores", np.zeros(5), {"lengths": 2}),
        (ValueError, "scores", np.zeros(()), {}),
    ],
)
def test_bad_input_is_named(error, match, scores, options):
    with pytest.raises(error, match=match):
        masked_softmax(scores, **options)
