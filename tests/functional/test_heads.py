"""Heads: round trips, which entry goes where, and the folded form against the unfolded one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import heads, masks

B, T, N, H = 2, 5, 6, 3


def test_split_heads_puts_every_entry_where_it_belongs(rng):
    x = rng.standard_normal((B, T, N * H)).astype(np.float32)
    split = heads.split_heads(x, N)
    for b, t, n, h in np.ndindex(B, T, N, H):
        assert split[b, t, n, h] == x[b, t, n * H + h]
    np.testing.assert_array_equal(heads.merge_heads(split), x)


@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_query_head_h_shares_key_head_h_over_G(K, rng):
    x = rng.standard_normal((B, T, N, H)).astype(np.float32)
    grouped = heads.group_heads(x, K)
    assert grouped.shape == (B, T, K, N // K, H)
    for n in range(N):
        np.testing.assert_array_equal(grouped[:, :, n // (N // K), n % (N // K)], x[:, :, n])
    np.testing.assert_array_equal(heads.ungroup_heads(grouped), x)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_heads_are_grouped_along_any_axis(axis, rng):
    x = np.moveaxis(rng.standard_normal((B, T, N)).astype(np.float32), -1, axis)
    grouped = heads.group_heads(x, 2, axis=axis)
    for n in range(N):
        members = np.moveaxis(grouped, (axis - 1, axis), (0, 1))
        np.testing.assert_array_equal(members[n // 3, n % 3], np.moveaxis(x, axis, 0)[n])
    np.testing.assert_array_equal(heads.ungroup_heads(grouped, axis=axis - 1), x)


def test_folding_is_batch_major(rng):
    x = rng.standard_normal((B, T, N, H)).astype(np.float32)
    folded = heads.fold_heads(x)
    for b, n in np.ndindex(B, N):
        np.testing.assert_array_equal(folded[b * N + n], x[b, :, n])
    np.testing.assert_array_equal(heads.unfold_heads(folded, N), x)


@pytest.mark.parametrize(
    "lengths", [np.array([3, 5]), np.array([[0, 1, 2, 3, 5], [5, 4, 3, 2, 1]])], ids=["B", "BT"]
)
def test_folded_attention_is_unfolded_attention(lengths, rng, x64):
    x = rng.standard_normal((3, B, T, N, H))
    attend = jax.jit(lambda *x, lengths: jattn.attend(*x, mask=masks.padding(lengths)))
    unfolded = attend(*x, lengths=lengths)
    repeated = np.asarray(heads.repeat_lengths(lengths, N))
    for b, n in np.ndindex(B, N):
        np.testing.assert_array_equal(repeated[b * N + n], lengths[b])
    query, key, value = (heads.fold_heads(array)[:, :, None] for array in x)
    folded = attend(query, key, value, lengths=repeated).squeeze(2)
    np.testing.assert_allclose(heads.unfold_heads(folded, N), unfolded, rtol=1e-13)


def test_any_leading_axes():
    assert heads.split_heads(jnp.zeros((6,))[None], 3).shape == (1, 3, 2)
    assert heads.split_heads(jnp.zeros((2, 3, 5, 6)), 3).shape == (2, 3, 5, 3, 2)
    assert heads.merge_heads(jnp.zeros((0, 3, 2))).shape == (0, 6)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (
            r"\(7\) must be a multiple of num_heads \(3\)",
            lambda: heads.split_heads(np.zeros((2, 7)), 3),
        ),
        (
            r"num_heads must be an integer of at least 1, got 0",
            lambda: heads.split_heads(np.zeros((2, 7)), 0),
        ),
        (
            r"num_heads must be an integer of at least 1, got -7",
            lambda: heads.split_heads(np.zeros((2, 7)), -7),
        ),
        (r"x must be .*got shape \(7,\)", lambda: heads.split_heads(np.zeros(7), 7)),
        (r"x must be .*got shape \(2, 7\)", lambda: heads.merge_heads(np.zeros((2, 7)))),
        (
            r"\(5\) must be a multiple of num_kv_heads \(2\)",
            lambda: heads.group_heads(np.zeros((3, 5, 7)), 2),
        ),
        (
            r"x must have the axis of heads N at axis -2, got shape \(7,\)",
            lambda: heads.group_heads(np.zeros(7), 7),
        ),
        (
            r"x must have the axes of key heads K .* at axis -3, got shape \(5, 7\)",
            lambda: heads.ungroup_heads(np.zeros((5, 7))),
        ),
        ("at axis 0, got shape", lambda: heads.group_heads(np.zeros((2, 7)), 2, axis=0)),
        ("at axis -1, got shape", lambda: heads.ungroup_heads(np.zeros((2, 7)), axis=-1)),
        (r"x must be .*got shape \(2, 5, 7\)", lambda: heads.fold_heads(np.zeros((2, 5, 7)))),
        (
            r"first axis of x \(5\) must be a multiple",
            lambda: heads.unfold_heads(np.zeros((5, 2, 7)), 3),
        ),
        (r"lengths must be \[B\] or \[B, T\], got shape \(\)", lambda: heads.repeat_lengths(3, 2)),
        ("num_heads", lambda: heads.repeat_lengths(np.array([3, 5]), 0)),
    ],
)
def test_bad_input_is_named(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_lengths_must_be_integers():
    with pytest.raises(TypeError, match="lengths must be integers, got float"):
        heads.repeat_lengths(np.array([3.0]), 2)


def test_pooling_neither_overflows_nor_loses_equal_heads():
    halves = np.array([[6e4], [-6e4], [np.inf], [np.inf]], np.float16)
    found = heads.pool_heads(halves, 2)
    np.testing.assert_array_equal(found, np.array([[0], [np.inf]], np.float16))
    assert found.dtype == np.float16
