"""merge_partials: the closed form, empty and far parts, gradients, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn

merge_partials = jax.jit(jattn.merge_partials)
B, T, S, N, K, H, V = 2, 5, 7, 6, 2, 3, 11


def of(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def part(rng, output=(B, T, N, V), dtype=np.float64):
    return rng.standard_normal(output).astype(dtype), rng.standard_normal(output[:-1]).astype(dtype)


def test_merge_is_the_closed_form_for_many_parts(rng, x64):
    parts = [part(rng) for _ in range(7)]
    outputs, lses = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    total = np.exp(lses).sum(0)
    output, lse = merge_partials(parts)
    np.testing.assert_allclose(
        output,
        (np.exp(lses)[..., None] * outputs).sum(0) / total[..., None],
        rtol=1e-12,
        atol=1e-14,
    )
    np.testing.assert_allclose(lse, np.log(total), rtol=1e-12)
    for again in (
        merge_partials(parts[::-1]),
        merge_partials([merge_partials(parts[:3]), merge_partials(parts[3:])]),
    ):
        np.testing.assert_allclose(again[0], output, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(again[1], lse, rtol=1e-12)
    for same in zip(merge_partials(parts[:1]), parts[0], strict=True):
        np.testing.assert_allclose(*same, rtol=1e-15)


def test_empty_parts_add_nothing_and_take_no_gradient(rng, x64):
    output, lse = part(rng)
    empty, mixed = np.full(lse.shape, -np.inf), np.where(rng.random(lse.shape) < 0.5, lse, -np.inf)
    merged = merge_partials([(0 * output, empty), (output, mixed), (0 * output, empty)])
    np.testing.assert_array_equal(merged[0], np.where(np.isneginf(mixed)[..., None], 0, output))
    np.testing.assert_array_equal(merged[1], mixed)

    def loss(parts):
        output, lse = merge_partials(parts)
        return jnp.sin(output).sum() + jnp.where(jnp.isneginf(lse), 0, jnp.sin(lse)).sum()

    gradient = jax.jit(jax.grad(loss))([(0 * output, empty), (output, mixed)])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all((leaf == 0).all() for leaf in gradient[0])
    finite, mixed = np.isfinite(mixed), np.where(np.isfinite(mixed), mixed, 0)
    np.testing.assert_allclose(gradient[1][1], np.where(finite, np.cos(mixed), 0), rtol=1e-12)
    np.testing.assert_allclose(
        gradient[1][0], np.where(finite[..., None], np.cos(output), 0), rtol=1e-12
    )


def test_merge_of_far_parts_neither_overflows_nor_loses_the_small(x64):
    one = np.ones((1, 1, 1))
    for high in (1e4, -1e4):
        output, lse = merge_partials(
            [(one, np.full((1, 1), high)), (3 * one, np.full((1, 1), high - math.log(3)))]
        )
        # An lse of 1e4 has an ulp of 2e-12
        np.testing.assert_allclose(output, 1.5 * one, rtol=1e-11)
        np.testing.assert_allclose(lse, high + math.log(4 / 3), rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_merge_keeps_the_dtypes_of_attend(dtype):
    parts = [(jnp.ones((T, N, V), dtype), jnp.zeros((T, N)))] * 2
    output, lse = merge_partials(parts)
    assert output.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "parts"),
    [
        (ValueError, "at least one .*got none", []),
        (
            ValueError,
            r"parts\[1\] must be .*\(2, 3, 5\).*got \(2, 3, 7\) and \(2, 3\)",
            [(of(2, 3, 5), of(2, 3)), (of(2, 3, 7), of(2, 3))],
        ),
        (
            ValueError,
            r"parts\[0\] must be .*got \(2, 3, 5\) and \(3, 2\)",
            [(of(2, 3, 5), of(3, 2))],
        ),
        (
            ValueError,
            r"parts\[0\] must be .*got \(2, 3, 5\) and \(2, 3, 1\)",
            [(of(2, 3, 5), of(2, 3, 1))],
        ),
        (TypeError, "floating point", [(of(2, 3, 5, dtype=np.int32), of(2, 3, dtype=np.int32))]),
    ],
)
def test_bad_parts_are_named(error, match, parts):
    with pytest.raises(error, match=match):
        jattn.merge_partials(parts)
