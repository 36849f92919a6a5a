"""Splitting a width into heads and back, and grouping query heads over shared key/value heads."""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from jattn.functional import checks

Array = jax.Array


def split_heads(x: Array, num_heads: int) -> Array:
    """Split the last axis into heads: `[..., T, N·H] -> [..., T, N, H]`.

    Raises:
      ValueError: the width is not divisible by the number of heads.

    Example:
      >>> split_heads(jnp.zeros((2, 5, 12)), 3).shape
      (2, 5, 3, 4)
    """
    checks.assert_shapes(x=(x, "... T D"))
    _check_divisible("the last axis of x", x.shape[-1], "num_heads", num_heads)
    return rearrange(x, "... T (N H) -> ... T N H", N=num_heads)


def merge_heads(x: Array) -> Array:
    """Concatenate the heads, the inverse of `split_heads`: `[..., T, N, H] -> [..., T, N·H]`.

    Raises:
      ValueError: x has no head axis.

    Example:
      >>> merge_heads(jnp.zeros((2, 5, 3, 4))).shape
      (2, 5, 12)
    """
    checks.assert_shapes(x=(x, "... T N H"))
    return rearrange(x, "... T N H -> ... T (N H)")


def group_heads(x: Array, num_kv_heads: int) -> Array:
    """Group query heads that share a key head: `[..., T, N, H] -> [..., T, K, G, H]`.

    Query head h uses key head `h // G`.

    Raises:
      ValueError: N is not divisible by K.

    Paper: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245

    Example:
      >>> group_heads(jnp.zeros((5, 6, 4)), 2).shape
      (5, 2, 3, 4)
    """
    checks.assert_shapes(x=(x, "... T N H"))
    _check_divisible("the number of heads of x", x.shape[-2], "num_kv_heads", num_kv_heads)
    return rearrange(x, "... T (K G) H -> ... T K G H", K=num_kv_heads)


def ungroup_heads(x: Array) -> Array:
    """The inverse of `group_heads`: `[..., T, K, G, H] -> [..., T, N, H]`.

    Raises:
      ValueError: x has no group axis.

    Example:
      >>> ungroup_heads(jnp.zeros((5, 2, 3, 4))).shape
      (5, 6, 4)
    """
    checks.assert_shapes(x=(x, "... T K G H"))
    return rearrange(x, "... T K G H -> ... T (K G) H")


def repeat_kv(x: Array, num_heads: int) -> Array:
    """Repeat every key/value head for its query heads: `[..., S, K, H] -> [..., S, N, H]`.

    Each query head gets its own copy of the key/value head that it shares with others.
    `attend` does not need this; it is for code that knows no grouped heads.

    Raises:
      ValueError: N is not divisible by K.

    Example:
      >>> repeat_kv(jnp.array([[[1.0], [2.0]]]), 4)[0, :, 0]
      Array([1., 1., 2., 2.], dtype=float32)
    """
    checks.assert_shapes(x=(x, "... S K H"))
    checks.assert_positive(num_heads=num_heads)
    _check_divisible("num_heads", num_heads, "the number of heads of x", x.shape[-2])
    return repeat(x, "... S K H -> ... S (K G) H", G=num_heads // x.shape[-2])


def fold_heads(x: Array) -> Array:
    """Make heads part of the batch: `[B, T, N, H] -> [B·N, T, H]`.

    Head n of example b becomes row b·N + n.

    Raises:
      ValueError: x is not of rank 4.

    Example:
      >>> fold_heads(jnp.zeros((2, 5, 3, 4))).shape
      (6, 5, 4)
    """
    checks.assert_shapes(x=(x, "B T N H"))
    return rearrange(x, "B T N H -> (B N) T H")


def unfold_heads(x: Array, num_heads: int) -> Array:
    """The inverse of `fold_heads`: `[B·N, T, H] -> [B, T, N, H]`.

    Raises:
      ValueError: the first axis is not divisible by the number of heads.

    Example:
      >>> unfold_heads(jnp.zeros((6, 5, 4)), 3).shape
      (2, 5, 3, 4)
    """
    checks.assert_shapes(x=(x, "B T H"))
    _check_divisible("the first axis of x", x.shape[0], "num_heads", num_heads)
    return rearrange(x, "(B N) T H -> B T N H", N=num_heads)


def repeat_lengths(lengths: Array, num_heads: int) -> Array:
    """Repeat lengths for folded heads, once per head: `[B] -> [B·N]`, or `[B, T] -> [B·N, T]`.

    Example:
      >>> repeat_lengths(jnp.array([3, 5]), 2)
      Array([3, 3, 5, 5], dtype=int32)
    """
    lengths = jnp.asarray(lengths)
    checks.assert_integers(lengths=lengths)
    checks.assert_positive(num_heads=num_heads)
    if lengths.ndim not in (1, 2):
        raise ValueError(f"lengths must be [B] or [B, T], got shape {lengths.shape}")
    return repeat(lengths, "B ... -> (B N) ...", N=num_heads)


def _check_divisible(name: str, size: int, divisor_name: str, divisor: int) -> None:
    checks.assert_positive(**{divisor_name.replace(" ", "_"): divisor})
    if size % divisor:
        raise ValueError(f"{name} ({size}) must be divisible by {divisor_name} ({divisor})")
