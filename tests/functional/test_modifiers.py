"""Modifiers.

T5's buckets in exact integers, ALiBi's slopes, tables, published FlexAttention mods, errors.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import modifiers, scores
from tests import oracle

B, N, T, S = 2, 6, 5, 7


def bucket(offset, num_buckets, max_distance, bidirectional):
    """The bucket of key position − query position by the definition of T5.

    In Python integers without a logarithm: near + ⌊log(d / near) / log(max / near) · far⌋ =
    near + k exactly while (d / near)^far ≥ (max / near)^k.
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        first, distance = (num_buckets if offset > 0 else 0), abs(offset)
    else:
        distance = max(-offset, 0)
    near = num_buckets // 2
    if distance < near:
        return first + distance
    far, k = num_buckets - near, 0
    while k + 1 < far and distance**far * near ** (k + 1) >= max_distance ** (k + 1) * near**far:
        k += 1
    return first + near + k


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"),
    [(32, 128), (32, 20), (4, 7), (64, 1000), (8, 512), (6, 11), (10, 128)],
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_are_exact_for_every_distance(num_buckets, max_distance, bidirectional):
    table = np.arange(num_buckets, dtype=np.float32)[:, None]
    modifier = modifiers.t5_bias(table, bidirectional=bidirectional, max_distance=max_distance)
    offsets = np.arange(-1000, 1001)
    came = jax.jit(jax.vmap(lambda offset: modifier(0.0, 0, 0, 1000, 1000 + offset)))(offsets)
    truth = [bucket(int(offset), num_buckets, max_distance, bidirectional) for offset in offsets]
    np.testing.assert_array_equal(came, truth)


def test_t5_buckets_of_the_published_model():
    """By hand from Raffel et al.'s 32 buckets to 128.

    Edges 8 · 16^(k/8), so 12, 16, 23, 32, 46, 64 and 91.
    """
    modifier = modifiers.t5_bias(np.arange(32, dtype=np.float32)[:, None])
    for distance, expected in [
        (0, 0), (1, 1), (7, 7), (8, 8), (11, 8), (12, 9), (15, 9), (16, 10), (22, 10), (23, 11),
        (31, 11), (32, 12), (45, 12), (46, 13), (63, 13), (64, 14), (90, 14), (91, 15), (127, 15),
        (128, 15), (10**6, 15),
    ]:  # fmt: skip
        assert float(modifier(0.0, 0, 0, distance, 0)) == expected
        assert float(modifier(0.0, 0, 0, 0, distance)) == (expected + 16 if distance else 0)


def test_t5_bias_picks_the_head(rng, x64):
    table, x = rng.standard_normal((32, N)), rng.standard_normal((3, B, T, N, 2))
    came = jattn.attend(
        *x, modifier=modifiers.t5_bias(table, bidirectional=False), score=scores.dot_product
    )
    truth, _, _ = oracle.attend(
        *x,
        score=lambda q, k, h: float(q @ k),
        modify=lambda z, b, h, t, s: z + table[bucket(s - t, 32, 128, False), h],
    )
    np.testing.assert_allclose(came, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("num_heads", [1, 2, 8, 16, 64])
def test_alibi_slopes_of_a_power_of_two_are_geometric(num_heads):
    ratio = 2.0 ** (-8 / num_heads)
    np.testing.assert_allclose(
        modifiers.alibi_slopes(num_heads), [ratio**h for h in range(1, num_heads + 1)], rtol=1e-6
    )


@pytest.mark.parametrize("num_heads", [3, 5, 6, 7, 12, 20])
def test_other_alibi_slopes_interleave_the_next_power_of_two(num_heads):
    """The authors' published recipe: slopes(p), then every second one of slopes(2 p)."""

    def power(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    below = 2 ** math.floor(math.log2(num_heads))
    truth = power(below) + power(2 * below)[0::2][: num_heads - below]
    slopes = modifiers.alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,) and slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, truth, rtol=1e-6)


def test_alibi_of_one_score():
    modifier = modifiers.alibi(np.array([0.5, 0.25], np.float32))
    assert float(modifier(1.0, 0, 1, 2, 6)) == 0.0 and float(modifier(1.0, 0, 0, 6, 2)) == -1.0


def test_relative_bias_reads_one_row_per_head_or_one_for_all(rng):
    table = rng.standard_normal((N, 13)).astype(np.float32)
    per_head, shared = modifiers.relative_bias(table), modifiers.relative_bias(table[0])
    for h, i, j in [(0, 0, 0), (3, 6, 0), (5, 0, 6), (2, 4, 1)]:
        assert float(per_head(0.0, 0, h, i, j)) == table[h, i - j + 6]
        assert float(shared(0.0, 0, h, i, j)) == table[0, i - j + 6]


@pytest.mark.parametrize(("q_idx", "k_idx"), [(7, 0), (0, 7), (100, 0), (0, 100), (0, 14)])
def test_a_traced_offset_beyond_the_table_is_never_a_wrong_number(q_idx, k_idx):
    """Not the last row, and not a row read from the end."""
    modifier = modifiers.relative_bias(np.arange(13, dtype=np.float32))
    assert jnp.isnan(jax.jit(lambda q_idx: modifier(0.0, 0, 0, q_idx, k_idx))(q_idx))


@pytest.mark.parametrize("length", [T, S])
def test_a_known_offset_beyond_the_table_is_an_error(length):
    x = jnp.zeros((B, length, 1, 2))
    with pytest.raises(ValueError, match="relative_bias"):
        jattn.attend(x, x, x, modifier=modifiers.relative_bias(np.zeros(7, np.float32)))


def test_relative_bias_follows_positions_into_a_short_table():
    """A cached step.

    One query at 1000 that sees the last keys only needs a table of those offsets.
    """
    x = jnp.zeros((1, 3, 1, 2))
    table = np.array([9, 9, 9, 1, 2, 3, 4], np.float32)
    weights = jattn.attention_weights(
        x[:, :1],
        x,
        modifier=modifiers.relative_bias(table),
        positions=(np.array([1000]), np.array([998, 999, 1000])),
    )
    np.testing.assert_allclose(
        weights.ravel(), np.exp([3, 2, 1]) / np.exp([1, 2, 3]).sum(), rtol=1e-6
    )


def test_bias_broadcasts_and_differs_by_example_and_head(rng):
    whole, x = (
        rng.standard_normal((B, N, T, S)).astype(np.float32),
        np.zeros((B, T, N, 2), np.float32),
    )
    keys = np.zeros((B, S, N, 2), np.float32)
    for array in (
        whole,
        whole[:, :1],
        whole[:, :, :1],
        whole[0],
        whole[0, 0],
        whole[..., :1, :],
        whole[0, 0, 0],
    ):
        truth = np.exp(np.broadcast_to(array, whole.shape).astype(np.float64))
        weights = jattn.attention_weights(x, keys, modifier=modifiers.bias(array))
        np.testing.assert_allclose(weights, truth / truth.sum(-1, keepdims=True), rtol=1e-5)
    assert float(modifiers.bias(whole)(1.0, 1, 4, 3, 2)) == np.float32(1) + whole[1, 4, 3, 2]


def test_soft_cap_is_the_closed_form(rng, x64):
    for x in (-1e9, -30.0, 0.0, 1e-9, 2.5, 1e9):
        assert float(modifiers.soft_cap(5.0)(x, 0, 0, 0, 0)) == pytest.approx(
            5 * math.tanh(x / 5), rel=1e-13
        )


@pytest.mark.parametrize(
    "cap",
    [5, 5.0, np.float32(5), np.float64(5), np.array(5), np.float16(5), np.array(5, np.int16)],
    ids=["int", "float", "float32", "float64", "NumPy", "float16", "int16"],
)
def test_a_number_of_any_type_is_a_cap(cap):
    x = jnp.full((1, 1, 1), 3.0)
    if isinstance(cap, np.generic | np.ndarray):
        cap = jnp.asarray(cap)
    _, lse = jattn.attend(x, x, x, modifier=modifiers.soft_cap(cap), return_lse=True)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, [[5 * math.tanh(9 / 5)]], rtol=1e-6)


def test_a_tuple_applies_from_left_to_right():
    x = jnp.full((1, 1, 1), 2.0)

    def lse(*modifier):
        return float(
            jattn.attend(x, x, x, score=scores.dot_product, modifier=modifier, return_lse=True)[
                1
            ].squeeze()
        )

    cap, add = modifiers.soft_cap(3.0), (lambda score, b, h, q_idx, k_idx: score + 1.0)
    assert lse(cap, add) == pytest.approx(3 * math.tanh(4 / 3) + 1, rel=1e-6)
    assert lse(add, cap) == pytest.approx(3 * math.tanh(5 / 3), rel=1e-6)
    assert lse() == 4.0


def test_modifiers_are_pytrees_whose_arrays_are_differentiated(rng, x64):
    x, bias = rng.standard_normal((3, B, T, N, 2)), rng.standard_normal((N, T, T))
    slopes, table, buckets = rng.random(N), rng.standard_normal((N, 9)), rng.standard_normal((8, N))
    made = (
        modifiers.alibi(slopes), modifiers.relative_bias(table),
        modifiers.t5_bias(buckets, max_distance=3),
        modifiers.bias(bias), modifiers.soft_cap(np.array(2.0)),
    )  # fmt: skip
    assert [leaf.shape for leaf in jax.tree.leaves(made)] == [(N,), (N, 9), (8, N), (N, T, T), ()]

    def loss(modifier):
        return jnp.sin(jattn.attend(*x, modifier=modifier)).sum()

    gradient = jax.jit(jax.grad(loss))(made)
    step = jax.jit(loss)
    for index, leaf in [(0, (2,)), (1, (3, 4)), (2, (1, 5)), (3, (1, 2, 3)), (4, ())]:
        leaves, treedef = jax.tree.flatten(made)
        ends = []
        for side in (1e-6, -1e-6):
            moved = leaves[index].copy()
            moved[leaf] += side
            ends.append(
                step(jax.tree.unflatten(treedef, [*leaves[:index], moved, *leaves[index + 1 :]]))
            )
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(
            jax.tree.leaves(gradient)[index][leaf], slope, rtol=1e-6, atol=1e-9
        )


def test_published_score_mods(rng):
    """As FlexAttention's gallery writes them, `torch.` read as `jnp.`.

    Users run under standard promotion.
    """
    x, bias = (
        rng.standard_normal((3, B, S, 4, 3)),
        jnp.asarray(rng.standard_normal(2 * S), jnp.float32),
    )
    alibi_bias = jnp.asarray(2.0 ** -np.arange(1, 5), jnp.float32)
    documents, cap = jnp.array([0, 0, 1, 1, 1, 2, 2]), 2.0
    docs = np.asarray(documents)

    def causal(score, b, h, q_idx, kv_idx):
        return jnp.where(q_idx >= kv_idx, score, -float("inf"))

    def relative_positional(score, b, h, q_idx, kv_idx):
        return score + (q_idx - kv_idx)

    def relative_positional_bias(score, b, h, q_idx, kv_idx):
        return score + bias[q_idx - kv_idx + S]

    def alibi(score, b, h, q_idx, kv_idx):
        return score + (kv_idx - q_idx) * alibi_bias[h]

    def tanh_softcap(score, b, h, q_idx, kv_idx):
        return cap * jnp.tanh(score / cap)

    def document(score, b, h, q_idx, kv_idx):
        return jnp.where(documents[q_idx] == documents[kv_idx], score, -float("inf"))

    table = np.asarray(bias, np.float64)
    for mod, modify, allowed in [
        (causal, lambda z, b, h, t, s: z, lambda b, h, t, s: t >= s),
        (relative_positional, lambda z, b, h, t, s: z + t - s, None),
        (relative_positional_bias, lambda z, b, h, t, s: z + table[t - s + S], None),
        (alibi, lambda z, b, h, t, s: z + (s - t) * 2.0 ** -(h + 1), None),
        (tanh_softcap, lambda z, b, h, t, s: cap * math.tanh(z / cap), None),
        (document, lambda z, b, h, t, s: z, lambda b, h, t, s: docs[t] == docs[s]),
    ]:
        with jax.numpy_dtype_promotion("standard"):
            came = jax.jit(lambda *x, mod=mod: jattn.attend(*x, modifier=mod))(
                *x.astype(np.float32)
            )
        truth, _, _ = oracle.attend(
            *x, score=oracle.scaled_dot_product, modify=modify, allowed=allowed
        )
        np.testing.assert_allclose(came, truth, rtol=1e-5, atol=1e-6, err_msg=mod.__name__)


def fits(modifier):
    x, y = jnp.zeros((B, T, N, 2)), jnp.zeros((B, S, N, 2))
    return jattn.attend(x, y, y, modifier=modifier)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "cap must be .*got 0", lambda: modifiers.soft_cap(0)),
        (ValueError, "cap must be .*got -1", lambda: modifiers.soft_cap(-1.0)),
        (ValueError, "cap must be .*got nan", lambda: modifiers.soft_cap(float("nan"))),
        (ValueError, "cap must be .*got inf", lambda: modifiers.soft_cap(float("inf"))),
        (ValueError, "cap must be", lambda: modifiers.soft_cap(np.ones(2))),
        (
            TypeError,
            "slopes must be floating point, got int",
            lambda: modifiers.alibi(np.array([1, 2])),
        ),
        (
            ValueError,
            r"slopes must be \[N\], got shape \(2, 3\)",
            lambda: modifiers.alibi(np.ones((2, 3))),
        ),
        (ValueError, "num_heads must be at least 1, got 0", lambda: modifiers.alibi_slopes(0)),
        (
            TypeError,
            "table must be floating point",
            lambda: modifiers.relative_bias(np.array([1, 2, 3])),
        ),
        (ValueError, r"2 L − 1.*got shape \(4,\)", lambda: modifiers.relative_bias(np.zeros(4))),
        (
            ValueError,
            r"2 L − 1.*got shape \(1, 2, 3\)",
            lambda: modifiers.relative_bias(np.zeros((1, 2, 3))),
        ),
        (ValueError, "table must be .*got shape", lambda: modifiers.t5_bias(np.zeros(32))),
        (
            TypeError,
            "table must be floating point",
            lambda: modifiers.t5_bias(np.zeros((32, 2), int)),
        ),
        (ValueError, "even number.*got 7 buckets", lambda: modifiers.t5_bias(np.zeros((7, 2)))),
        (ValueError, "got 2 buckets", lambda: modifiers.t5_bias(np.zeros((2, 2)))),
        (
            ValueError,
            "max_distance 8",
            lambda: modifiers.t5_bias(np.zeros((32, 2)), max_distance=8),
        ),
        (TypeError, "floating point, got int", lambda: modifiers.bias(np.zeros((T, S), int))),
        (
            ValueError,
            "alibi slopes .*N = 6, got 3",
            lambda: fits(modifiers.alibi(np.ones(3, np.float32))),
        ),
        (
            ValueError,
            "relative_bias table .*N = 6, got 3",
            lambda: fits(modifiers.relative_bias(np.ones((3, 13), np.float32))),
        ),
        (
            ValueError,
            "t5_bias table .*N = 6, got 3",
            lambda: fits(modifiers.t5_bias(np.ones((32, 3), np.float32))),
        ),
        (
            ValueError,
            r"bias must broadcast .*\(2, 6, 5, 7\), got shape \(7, 5\)",
            lambda: fits(modifiers.bias(np.ones((S, T), np.float32))),
        ),
        (
            ValueError,
            r"bias\[:, None\]",
            lambda: fits(modifiers.bias(np.ones((B, T, S), np.float32))),
        ),
        (TypeError, "modifier must be callable.*got str", lambda: fits("alibi")),
        (TypeError, "use jattn.modifiers.bias", lambda: fits(np.ones((T, S), np.float32))),
        (
            TypeError,
            "floating-point score, got bool",
            lambda: fits(lambda score, b, h, q_idx, k_idx: q_idx > k_idx),
        ),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(("q", "k"), [(-1, 2**31 - 1), (2**31 - 1, -1), (2**31 - 1, -(2**31) + 1)])
def test_distances_beyond_int32_do_not_wrap_around(q, k):
    """ALiBi has the distance; a table has no row for it; T5 has the last bucket."""
    distance = abs(q - k)
    assert float(modifiers.alibi(np.ones(1, np.float32))(0.0, 0, 0, q, k)) == -np.float32(distance)
    assert jnp.isnan(modifiers.relative_bias(jnp.zeros(2001))(0.0, 0, 0, q, k))
    table = jnp.arange(32.0)[:, None]
    last = 31.0 if k > q else 15.0
    assert float(modifiers.t5_bias(table)(0.0, 0, 0, q, k)) == last
