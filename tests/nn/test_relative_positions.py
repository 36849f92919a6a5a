"""Relative positions in the scores: q · E[i − j + L − 1], against loops and with a cache."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import masks, modifiers
from jattn.functional import scores
from jattn.nn import MultiHeadAttention, RelativePositions
from jattn.nn.cache import WindowCache

B, T, H, D, L = 2, 9, 3, 12, 9
N = D // H
with_or_without = pytest.mark.parametrize(
    "with_key",
    [
        pytest.param(False, id="query", marks=pytest.mark.slow),
        pytest.param(True, id="query and key"),
    ],
)


def loops(query, key, value, table, *, with_key, allowed=lambda t, s: True, scale=None):
    """Attention in float64, one number after another."""
    query, key, value, table = (np.asarray(x, np.float64) for x in (query, key, value, table))
    (B, T, N, H), (_, S, K, V) = query.shape, value.shape
    scale, middle = 1 / math.sqrt(H) if scale is None else scale, len(table) // 2
    output = np.zeros((B, T, N, V))
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        k = n // (N // K)
        seen = [s for s in range(S) if allowed(t, s)]
        scores = []
        for s in seen:
            row = table[t - s + middle]
            score = query[b, t, n] @ key[b, s, k] + query[b, t, n] @ row
            scores.append(scale * (score + (key[b, s, k] @ row if with_key else 0)))
        weights = np.exp(np.array(scores) - max(scores))
        output[b, t, n] = weights @ value[b, seen, k] / weights.sum()
    return output


def heads(rng, length, number, dtype=np.float64):
    return rng.normal(size=(B, length, number, H)).astype(dtype)


def operands(rng, T=5, S=7, K=N, rows=2 * L - 1, dtype=np.float64):
    query, key, value = (heads(rng, *size, dtype) for size in ((T, N), (S, K), (S, K)))
    return query, key, value, rng.normal(size=(rows, H)).astype(dtype)


def attended(query, key, value, table, *, with_key, scale=None, **options):
    own = modifiers.relative_key(query, table, key=key if with_key else None, scale=scale)
    score = functools.partial(scores.scaled_dot_product, scale=scale)
    return jattn.attend(query, key, value, score=score, modifier=own, **options)


@pytest.mark.parametrize("K", [N, 2])
@with_or_without
def test_scores_are_those_of_loops(with_key, K, kernel, rng, x64):
    """With several blocks, which divide neither queries nor keys."""
    x = operands(rng, K=K)
    for options, allowed in (({}, lambda t, s: True), ({"mask": masks.causal()}, np.greater_equal)):
        found = attended(*x, with_key=with_key, implementation=kernel, **options)
        expected = loops(*x, with_key=with_key, allowed=allowed)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@with_or_without
def test_the_scale_is_of_all_parts(with_key, rng, x64):
    x = operands(rng)
    found = attended(*x, with_key=with_key, scale=0.3)
    np.testing.assert_allclose(found, loops(*x, with_key=with_key, scale=0.3), rtol=1e-12)


@with_or_without
def test_one_score_is_the_formula(with_key, rng, x64):
    query, key, _, table = operands(rng)
    own = modifiers.relative_key(query, table, key=key if with_key else None)
    for b, n, t, s in [(0, 0, 0, 0), (1, 3, 4, 0), (1, 2, 0, 6), (0, 1, 2, 5)]:
        vector = query[b, t, n] + (key[b, s, n] if with_key else 0)
        expected = 0.25 + vector @ table[t - s + L - 1] / math.sqrt(H)
        assert float(own(0.25, b, n, t, s)) == pytest.approx(expected, rel=1e-12)


@with_or_without
def test_bfloat16_is_close_to_float32(with_key, rng):
    x = [jnp.asarray(each, jnp.bfloat16) for each in operands(rng)]
    wide = [each.astype(jnp.float32) for each in x]
    found, expected = (attended(*each, with_key=with_key) for each in (x, wide))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0, atol=0.03)
    mixed = attended(*x[:3], wide[3], with_key=with_key)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.astype(np.float32), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("K", [N, 2])
@with_or_without
def test_gradients_of_all_kernels_are_alike(with_key, K, kernel, rng, x64):
    x = operands(rng, K=K)

    def loss(x, implementation):
        out = attended(*x, with_key=with_key, implementation=implementation, mask=masks.causal())
        return jnp.sin(3 * out).sum()

    dense, others = (
        jax.jit(jax.grad(functools.partial(loss, implementation=name)))(tuple(map(jnp.asarray, x)))
        for name in ("dense", kernel)
    )
    for one, other in zip(dense, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)
    assert all(np.abs(each).max() > 1e-3 for each in dense)
    reached = np.abs(dense[3]).max(axis=1) > 0  # a causal query of 5 sees distances from 0 to 4
    assert reached.tolist() == [0 <= row - (L - 1) < 5 for row in range(2 * L - 1)]


@with_or_without
def test_gradients_are_slopes(with_key, rng, x64):
    x = operands(rng)
    table, direction = x[3], rng.normal(size=x[3].shape)

    def loss(table):
        return jnp.sin(attended(*x[:3], table, with_key=with_key)).sum()

    slope = (loss(table + 1e-6 * direction) - loss(table - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((jax.grad(loss)(table) * direction).sum(), slope, rtol=1e-7)


def made(with_key, max_length=L, **options):
    relative = RelativePositions(
        max_length, H, with_key=with_key, param_dtype=jnp.float64, rngs=nnx.Rngs(2), **options
    )
    relative.embedding[...] *= 50
    return MultiHeadAttention(N, D, attend=relative, param_dtype=jnp.float64, rngs=nnx.Rngs(3))


@pytest.fixture
def x(rng):
    return rng.normal(size=(B, T, D))


def in_chunks(attention, x, sizes, cache, **options):
    found, start = [], 0
    for size in sizes:
        output, cache = attention(x[:, start : start + size], cache=cache, **options)
        found.append(output)
        start += size
    assert start == T
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(
    ("sizes", "capacity"),
    [([1] * T, 3 * L), ([4, 1, 4], T)],
    ids=["tokens, more room", "chunks"],
)
@with_or_without
def test_a_cache_changes_no_number(with_key, sizes, capacity, x, x64):
    """Of slots that are not filled yet some are further away than the table knows."""
    attention = made(with_key)
    expected = attention(x, mask=masks.causal())
    cache = attention.empty_cache(B, capacity)
    found = in_chunks(attention, x, sizes, cache, mask=masks.causal())
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [[1] * T, [4, 1, 4]], ids=["tokens", "chunks"])
@with_or_without
def test_a_window_needs_a_table_of_the_window_alone(with_key, sizes, x, x64):
    """Of W = 4 tokens the distances are at most 3."""
    W = 4
    attention = made(with_key)
    expected = attention(x, mask=masks.sliding_window(W - 1))
    cache = WindowCache.empty(B, W, N, H, dtype=jnp.float64)
    found = in_chunks(attention, x, sizes, cache, mask=masks.sliding_window(W - 1))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    short = made(with_key, W)
    short.attend.embedding[...] = attention.attend.embedding[L - W : L + W - 1]
    found = in_chunks(short, x, sizes, cache, mask=masks.sliding_window(W - 1))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@with_or_without
def test_rows_of_different_lengths_go_on_from_their_own(with_key, x, x64):
    attention, lengths = made(with_key), [2, 5]
    cache = attention.empty_cache(B, T)
    _, cache = attention(x[:, :5], cache=cache, lengths=np.array(lengths), mask=masks.causal())
    newest = np.stack([x[row, n : n + 2] for row, n in enumerate(lengths)])
    found, _ = attention(newest, cache=cache, mask=masks.causal())
    for row, n in enumerate(lengths):
        alone = attention(x[row : row + 1, : n + 2], mask=masks.causal())
        np.testing.assert_allclose(found[row], alone[0, n:], rtol=1e-12, atol=1e-13)


@with_or_without
def test_a_distance_beyond_the_table_is_nan_and_never_the_nearest_row(with_key, x, x64):
    """Of positions of one's own and of a cache; without these it is an error."""
    attention = made(with_key, 4)
    with pytest.raises(ValueError, match="got 9 tokens, beyond the 4 relative positions"):
        attention(x, mask=masks.causal())
    with pytest.raises(ValueError, match="got 5 tokens, beyond the 4 relative positions"):
        attention(x[:, :2], x[:, :5])
    cache = attention.empty_cache(B, T)
    found, cache = attention(x[:, :4], cache=cache, mask=masks.causal())
    np.testing.assert_allclose(found, attention(x[:, :4], mask=masks.causal()), rtol=1e-12)
    found, _ = attention(x[:, 4:6], cache=cache, mask=masks.causal())
    assert np.isnan(found).all()
    places = np.array([0, 3, 4])
    found = attention(x[:, :3], positions=(places, places))
    assert np.isnan(found).all(-1).tolist() == [[True, False, True]] * B
    hidden = attention(x[:, :3], positions=(places, places), mask=masks.sliding_window(3, 3))
    assert np.isfinite(hidden).all()


@with_or_without
def test_positions_count_by_their_distance(with_key, x, x64):
    attention = made(with_key)
    expected = attention(x)
    for start in (0, 7, 10_000):
        places = start + np.arange(T)
        found = attention(x, positions=(places, places))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    short = attention(x[:, :3])
    np.testing.assert_allclose(short, made(with_key)(x[:, :3]), rtol=0)
    places = np.array([[0, 2, 8], [5, 1, 4]])
    found = attention(x[:, :3], positions=(places, places))
    for row in range(B):
        scattered = np.zeros((1, T, D))
        scattered[0, places[row]] = x[row, :3]
        seen = np.isin(np.arange(T), places[row])
        alone = attention(scattered, mask=seen[None, None, None])[0, places[row]]
        np.testing.assert_allclose(found[row], alone, rtol=1e-12, atol=1e-13)


@with_or_without
def test_all_forms_of_attend_are_taken(with_key, x, x64):
    expected = made(with_key)(x, mask=masks.causal())
    blockwise = functools.partial(jattn.attend, implementation="blockwise", mask=masks.causal())
    np.testing.assert_allclose(made(with_key, attend=blockwise)(x), expected, rtol=1e-12)
    slopes = modifiers.alibi(np.linspace(1, 2, N))
    first = made(with_key)(x, modifier=slopes)
    second = made(with_key, attend=functools.partial(jattn.attend, modifier=slopes))(x)
    np.testing.assert_allclose(first, second, rtol=1e-12)
    assert np.abs(first - made(with_key)(x)).max() > 1e-3
    _, weights = made(with_key)(x, return_weights=True)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)


@with_or_without
def test_jit_and_vmap_change_nothing(with_key, x, x64):
    attention = made(with_key)
    expected = attention(x)
    np.testing.assert_allclose(jax.jit(lambda x: attention(x))(x), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(lambda x: attention(x))(x), expected, rtol=1e-12)


def test_the_table_is_a_parameter_of_its_own():
    relative = RelativePositions(9, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert relative.embedding.shape == (17, 3) and relative.embedding.dtype == jnp.bfloat16
    wide = RelativePositions(500, 20, rngs=nnx.Rngs(0)).embedding[...]
    assert float(wide.std()) == pytest.approx(0.02, rel=0.05)
    ones = RelativePositions(9, 3, embedding_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    assert (ones.embedding[...] == 1).all()


def ready(rng, **changes):
    query, _, _, table = operands(rng)
    return {"query": query, "table": table, "key": None} | changes


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"table must be \[2 L − 1, H\], got shape \(8, 3\)", {"table": (8, 3)}),
        (ValueError, r"table must be \[rows, H\] with H = 3, got shape", {"table": (9, 4)}),
        (ValueError, r"table must be .*got shape \(9,\)", {"table": (9,)}),
        (ValueError, r"query must be .*got shape \(3,\)", {"query": (3,)}),
        (ValueError, r"N \(4\) must be a multiple of K \(3\)", {"key": (B, 7, 3, H)}),
        (ValueError, r"table must be .*with H = 2", {"key": (B, 7, N, 2)}),
    ],
)
def test_shapes_that_do_not_fit_are_named(error, match, changes, rng):
    changes = {name: np.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(error, match=match):
        modifiers.relative_key(**ready(rng, **changes))


@pytest.mark.parametrize("name", ["query", "table", "key"])
def test_integers_are_refused(name, rng):
    given = ready(rng, key=operands(rng)[1])
    given[name] = given[name].astype(int)
    with pytest.raises(TypeError, match=f"{name} must be floating point"):
        modifiers.relative_key(**given)


def test_a_modifier_of_other_queries_keys_or_lengths_is_refused(rng, x64):
    query, key, value, table = operands(rng)
    with pytest.raises(ValueError, match="table holds offsets of lengths up to 6, got T = 5 and S"):
        attended(query, key, value, table[:11], with_key=False)
    other = modifiers.relative_key(query[:, :2], table)
    with pytest.raises(ValueError, match="of the query of this call"):
        jattn.attend(query, key, value, modifier=other)
    other = modifiers.relative_key(query, table, key=key[:, :2])
    with pytest.raises(ValueError, match="of the key of this call"):
        jattn.attend(query, key, value, modifier=other)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "max_length must be", lambda make: make(0, 3)),
        (ValueError, "head_features must be", lambda make: make(9, 0)),
        (TypeError, "with_key must be True or False", lambda make: make(9, 3, with_key=1)),
        (TypeError, "attend must be callable", lambda make: make(9, 3, attend="blockwise")),
        (
            ValueError,
            "head_features is 3, got a query .* 4",
            lambda make: make(9, 3)(*[np.zeros((5, 2, 4), np.float32)] * 3),
        ),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call(functools.partial(RelativePositions, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "part"),
    [("query", np.s_[:, :1]), ("query", np.s_[:, :, :2]), ("key", np.s_[:, :1])],
)
def test_products_of_another_call_are_refused(name, part, rng):
    query, key, value, table = operands(rng, K=2)
    given = {"query": query, "key": key}
    modifier = modifiers.relative_key(table=table, **given | {name: given[name][part]})
    with pytest.raises(ValueError, match=f"relative_key must be of the {name} of this call"):
        jattn.attend(query, key, value, modifier=modifier)


def test_a_slot_mask_inside_does_not_meet_a_window(x):
    inner = functools.partial(jattn.attend, mask=masks.padding(jnp.array([3] * B)))
    relative = RelativePositions(L, H, attend=inner, rngs=nnx.Rngs(0))
    attention = MultiHeadAttention(N, D, attend=relative, rngs=nnx.Rngs(0))
    cache = attention.empty_cache(B, 20, window=4)
    with pytest.raises(ValueError, match="reads slots"):
        attention(x[:, :1], cache=cache, mask=masks.sliding_window(3))


def test_no_token_is_no_output():
    attention = MultiHeadAttention(
        N, D, attend=RelativePositions(L, H, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
    )
    assert attention(jnp.ones((B, 0, D))).shape == (B, 0, D)
