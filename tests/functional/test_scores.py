"""Every score against loops over single pairs: parameters, dtypes, derivatives and errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import scores
from tests import oracle

T, S, H = 5, 7, 3


def single(name, weight=None):
    """The score of one pair in float64 NumPy, straight from its definition."""
    return {
        "constant": lambda q, k: 0.0,
        "dot_product": lambda q, k: math.fsum(q * k),
        "scaled_dot_product": lambda q, k: math.fsum(q * k) / math.sqrt(len(q)),
        "bilinear": lambda q, k: math.fsum(
            q[i] * weight[i, j] * k[j] for i in range(len(q)) for j in range(len(k))
        ),
        "additive": lambda q, k: math.fsum(
            weight[i] * math.tanh(q[i] + k[i]) for i in range(len(q))
        ),
        "gaussian": lambda q, k: -math.fsum(((q - k) * (1 if weight is None else weight)) ** 2) / 2,
        "cosine": lambda q, k: math.fsum(q * k) / math.sqrt(math.fsum(q * q) * math.fsum(k * k)),
    }[name]


def loop(name, query, key, weight=None):
    return np.array([[single(name, weight)(q, k) for k in key] for q in query])


WEIGHTS = {"bilinear": (H, H), "additive": (H,), "gaussian": (H,)}
NAMES = [
    "constant",
    "dot_product",
    "scaled_dot_product",
    "bilinear",
    "additive",
    "gaussian",
    "cosine",
]


def bound(name, weight):
    function = getattr(scores, name)
    return functools.partial(function, weight=weight) if name in WEIGHTS else function


@pytest.mark.parametrize("name", NAMES)
def test_every_score_is_the_loop_and_takes_any_leading_axes(name, rng, x64):
    query, key = rng.standard_normal((2, 3, T, H)), rng.standard_normal((2, 3, S, H))
    weight = rng.standard_normal(WEIGHTS[name]) if name in WEIGHTS else None
    score = jax.jit(bound(name, weight))
    came = score(query, key)
    assert came.shape == (2, 3, T, S) and came.dtype == jnp.float64
    for b, h in np.ndindex(2, 3):
        np.testing.assert_allclose(
            came[b, h], loop(name, query[b, h], key[b, h], weight), rtol=1e-12, atol=1e-14
        )
    mapped = jax.jit(jax.vmap(jax.vmap(bound(name, weight))))(query, key)
    np.testing.assert_allclose(mapped, came, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(score(query[0, 0], key[0, 0]), came[0, 0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_one_weight_per_head_reaches_its_own_head(name, num_kv_heads, rng, x64):
    """In both layouts that attend uses: `[..., N]`, and `[..., K, G]` against `[..., K, 1]`."""
    N, K = 6, num_kv_heads
    query, key = rng.standard_normal((2, N, T, H)), rng.standard_normal((2, K, S, H))
    weight = rng.standard_normal((N, *WEIGHTS[name]))
    score = jax.jit(bound(name, weight))
    if K == N:
        came = score(query, key)
    else:
        came = score(query.reshape(2, K, N // K, T, H), key[:, :, None]).reshape(2, N, T, S)
    for b, h in np.ndindex(2, N):
        truth = loop(name, query[b, h], key[b, h // (N // K)], weight[h])
        np.testing.assert_allclose(came[b, h], truth, rtol=1e-12, atol=1e-14)


def test_bilinear_joins_two_widths(rng, x64):
    query, key, weight = (
        rng.standard_normal((T, 2)),
        rng.standard_normal((S, 11)),
        rng.standard_normal((2, 11)),
    )
    np.testing.assert_allclose(
        scores.bilinear(query, key, weight), query @ weight @ key.T, rtol=1e-12
    )


def test_scale_and_scalar_weight_replace_the_default(rng, x64):
    query, key = rng.standard_normal((T, H)), rng.standard_normal((S, H))
    np.testing.assert_allclose(
        scores.scaled_dot_product(query, key, 0.3), 0.3 * query @ key.T, rtol=1e-12
    )
    assert (scores.scaled_dot_product(query, key, 0) == 0).all()
    np.testing.assert_allclose(
        scores.gaussian(query, key, 0.5), loop("gaussian", query, key, np.float64(0.5)), rtol=1e-12
    )
    np.testing.assert_allclose(
        scores.cosine(query, key, scale=3.0), 3 * loop("cosine", query, key), rtol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_slopes_of_the_loop(name, rng, x64):
    query, key, cotangent = (
        rng.standard_normal((2, H)),
        rng.standard_normal((3, H)),
        rng.standard_normal((2, 3)),
    )
    weight = rng.standard_normal(WEIGHTS.get(name, (H,)))

    def loss(query, key, weight):
        return (bound(name, weight)(query, key) * cotangent).sum()

    def truth(query, key, weight):
        return (loop(name, query, key, weight if name in WEIGHTS else None) * cotangent).sum()

    arguments = [query, key, weight]
    for index, gradient in enumerate(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)):
        moved = functools.partial(
            lambda x, i: truth(*arguments[:i], x, *arguments[i + 1 :]), i=index
        )
        slopes = oracle.numerical_gradient(moved, arguments[index])
        # Central differences: ~1e-10
        np.testing.assert_allclose(gradient, slopes, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_have_finite_scores_and_derivatives(name, x64):
    """Hidden rows become zeros before the score."""
    zero = jnp.zeros((2, H))
    score = bound(name, jnp.ones(WEIGHTS.get(name, (H,))))
    value, pull = jax.vjp(score, zero, zero)
    assert jnp.isfinite(value).all()
    for gradient in pull(jnp.ones_like(value)):
        assert (gradient == 0).all() if name == "cosine" else jnp.isfinite(gradient).all()
    assert jnp.isfinite(jax.jit(jax.hessian(lambda query: score(query, zero).sum()))(zero)).all()


def test_the_gaussian_of_close_points_keeps_its_digits():
    """Expanding the square, ‖q‖² + ‖k‖² − 2qᵀk, would lose all of them in float32."""
    query, key = np.array([[1000.0]], np.float32), np.array([[1000.25]], np.float32)
    np.testing.assert_array_equal(scores.gaussian(query, key), [[-0.03125]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_float32(name, dtype, rng):
    """Parameters of the same half precision are raised with the operands.

    Under strict promotion too.
    """
    width = 509
    query, key = (jnp.asarray(rng.standard_normal((3, width)), dtype) for _ in range(2))
    shape = {"bilinear": (width, width)}.get(name, (width,))
    weight = jnp.asarray(rng.standard_normal(shape) / math.sqrt(width), dtype)
    came = bound(name, weight)(query, key)
    assert came.dtype == jnp.float32
    q, k, w = (np.asarray(array, np.float64) for array in (query, key, weight))
    truth = {
        "constant": lambda: np.zeros((3, 3)),
        "dot_product": lambda: q @ k.T,
        "scaled_dot_product": lambda: q @ k.T / math.sqrt(width),
        "bilinear": lambda: q @ w @ k.T,
        "additive": lambda: np.tanh(q[:, None] + k) @ w,
        "gaussian": lambda: -np.square((q[:, None] - k) * w).sum(-1) / 2,
        "cosine": lambda: q @ k.T / np.sqrt((q * q).sum(-1)[:, None] * (k * k).sum(-1)),
    }[name]()
    float32_sum = width * 2.0**-24 * np.abs(truth).max()  # the bound of a sum of so many terms
    # Between two products a result is rounded to the operands' precision, so that it is multiplied
    # as it comes: qᵀW once, and the two directions of a cosine, whose terms sum to at most 1
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    rounded = {"cosine": 2 * half_ulp}
    if name == "bilinear":
        rounded[name] = half_ulp * (np.abs(q @ w) @ np.abs(k).T).max()
    atol = max(float32_sum, 1e-6) + rounded.get(name, 0.0)
    np.testing.assert_allclose(came, truth, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [1e-23, 1e25])
def test_the_cosine_knows_no_scale(size):
    vector = jnp.array([[3.0, 4.0]]) * size
    np.testing.assert_allclose(scores.cosine(vector, vector), [[1.0]], rtol=1e-6)


def of(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            TypeError,
            "query must be floating point, got int32",
            lambda: scores.dot_product(of(2, 3, dtype=np.int32), of(5, 3)),
        ),
        (
            TypeError,
            "key must be floating point, got bool",
            lambda: scores.cosine(of(2, 3), of(5, 3, dtype=bool)),
        ),
        (
            ValueError,
            r"query must be \[..., T, H\], got shape \(3,\)",
            lambda: scores.dot_product(of(3), of(5, 3)),
        ),
        (
            ValueError,
            r"key must be \[..., S, H\], got shape \(3,\)",
            lambda: scores.dot_product(of(5, 3), of(3)),
        ),
        (
            ValueError,
            r"one width H.*\(2, 3\) and \(5, 7\)",
            lambda: scores.scaled_dot_product(of(2, 3), of(5, 7)),
        ),
        (ValueError, "one width", lambda: scores.additive(of(2, 3), of(5, 7), of(3))),
        (ValueError, "one width", lambda: scores.gaussian(of(2, 3), of(5, 1))),
        (ValueError, "one width", lambda: scores.cosine(of(2, 1), of(5, 3))),
        (
            ValueError,
            r"weight must be \(3, 7\).*got shape \(7, 3\)",
            lambda: scores.bilinear(of(2, 3), of(5, 7), of(7, 3)),
        ),
        (
            ValueError,
            r"weight must be \(3,\).*got shape \(1,\)",
            lambda: scores.additive(of(2, 3), of(5, 3), of(1)),
        ),
        (
            ValueError,
            r"weight must be \(3,\).*got shape \(\)",
            lambda: scores.additive(of(2, 3), of(5, 3), of()),
        ),
        (
            ValueError,
            r"weight must be .*got shape \(2,\)",
            lambda: scores.gaussian(of(2, 3), of(5, 3), of(2)),
        ),
        (
            ValueError,
            r"weight must be .*got shape \(5, 3\)",
            lambda: scores.additive(of(2, 2, 3), of(2, 5, 3), of(5, 3)),
        ),
        (ValueError, "weight", lambda: scores.additive(of(2, 3, 5, 3), of(2, 3, 7, 3), of(6, 3))),
        (ValueError, "weight", lambda: scores.additive(of(2, 3, 5, 3), of(2, 1, 7, 3), of(3, 3))),
    ],
)
def test_bad_input_is_named(error, match, call):
    """The last two: weights of the wrong kind.

    One weight per (example, head), and one per member of a group, are no weights per head.
    """
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("size", [4e-38, 1e-30, 1.0, 9e37, 3e38])
def test_the_cosine_of_vectors_near_the_ends_of_the_range(size):
    """Their squares leave it, and so does the reciprocal of the largest entry."""
    query, key = np.float32(size) * np.array([[0.6, 0.8]], np.float32), np.array([[1.0, 0.0]])
    came = scores.cosine(query, key.astype(np.float32))
    np.testing.assert_allclose(came, [[0.6]], rtol=1e-6)
