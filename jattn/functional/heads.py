"""Split a width into heads and merge them; group query heads over shared key/value heads."""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from jattn.functional import checks, dtypes

Array = jax.Array


def split_heads(x: Array, num_heads: int) -> Array:
    """Split the last axis into heads: `[..., T, N·H] -> [..., T, N, H]`.

    Args:
      x: `[..., T, N·H]`, any dtype.
      num_heads: N.

    Returns:
      `[..., T, N, H]`, in the dtype of `x`.

    Raises:
      ValueError: x has no length axis, `num_heads` is not a positive integer, or the width is not
        divisible by it.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> split_heads(jnp.zeros((2, 5, 12)), 3).shape
      (2, 5, 3, 4)
    """
    checks.assert_shapes(x=(x, "... T D"))
    checks.assert_divisible(**{"the last axis of x": (x.shape[-1], "num_heads", num_heads)})
    return rearrange(x, "... T (N H) -> ... T N H", N=num_heads)


def merge_heads(x: Array) -> Array:
    """Concatenate the heads: `[..., T, N, H] -> [..., T, N·H]`. The inverse of `split_heads`.

    Args:
      x: `[..., T, N, H]`, any dtype.

    Returns:
      `[..., T, N·H]`, in the dtype of `x`.

    Raises:
      ValueError: x has no head axis.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> merge_heads(jnp.zeros((2, 5, 3, 4))).shape
      (2, 5, 12)
    """
    checks.assert_shapes(x=(x, "... T N H"))
    return rearrange(x, "... T N H -> ... T (N H)")


def group_heads(x: Array, num_kv_heads: int, axis: int = -2) -> Array:
    """Group the query heads that share a key head: `[..., T, N, H] -> [..., T, K, G, H]`.

    Query head n becomes member `n % G` of group `n // G`.

    Args:
      x: any dtype, with N heads along `axis`.
      num_kv_heads: K, a divisor of N; G = N / K.
      axis: the axis of the heads, counted from the last: −2 for `[..., T, N, H]`, −3 for
        `[..., N, T, H]`.

    Returns:
      `x` with axes K and G in the place of N, in the same dtype.

    Raises:
      ValueError: x has no such axis, `num_kv_heads` is not a positive integer, or N is not
        divisible by it.

    Paper: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245

    Example:
      >>> group_heads(jnp.zeros((5, 6, 4)), 2).shape
      (5, 2, 3, 4)
    """
    before, (N, *after) = _split_shape(x, axis, 1, "axis of heads N")
    checks.assert_divisible(**{"the number of heads of x": (N, "num_kv_heads", num_kv_heads)})
    return jnp.reshape(x, (*before, num_kv_heads, N // num_kv_heads, *after))


def pool_heads(x: Array, num_kv_heads: int) -> Array:
    """The mean of each group of consecutive heads: `[..., N, H] -> [..., K, H]`.

    It makes multi-head weights grouped-query weights: applied to kernels `[D, N, H]` and biases
    `[N, H]` of key and value. Where the heads of a group are equal, they come out bit for bit.

    Args:
      x: floating point.
      num_kv_heads: K, a divisor of N.

    Returns:
      The means, in the dtype of x.

    Raises:
      ValueError: N is not divisible by `num_kv_heads`, or that is not positive.
      TypeError: x is not floating point.

    Paper: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245, section 2.1

    Example:
      >>> pool_heads(jnp.array([[1.0], [3.0], [5.0], [5.0]]), 2)
      Array([[2.],
             [5.]], dtype=float32)
    """
    checks.assert_floating(x=x)
    x = jnp.asarray(x)
    groups = group_heads(x.astype(dtypes.accumulator(x.dtype)), num_kv_heads)
    first = groups[..., :1, :]
    means = first + jnp.mean(groups - first, axis=-2, keepdims=True)
    equal = (groups == first).all(-2, keepdims=True)  # inf, too
    return jnp.where(equal, first, means)[..., 0, :].astype(x.dtype)


def ungroup_heads(x: Array, axis: int = -3) -> Array:
    """Undo `group_heads`: `[..., T, K, G, H] -> [..., T, N, H]`.

    Args:
      x: any dtype, with K key heads along `axis` and G query heads of each along the next.
      axis: the axis of the key heads, counted from the last: −3 for `[..., T, K, G, H]`, −4 for
        `[..., K, G, T, H]`.

    Returns:
      `x` with one axis of N = K · G heads in the place of K and G, in the same dtype.

    Raises:
      ValueError: x has no such axes.

    Paper: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245

    Example:
      >>> ungroup_heads(jnp.zeros((5, 2, 3, 4))).shape
      (5, 6, 4)
    """
    before, (K, G, *after) = _split_shape(x, axis, 2, "axes of key heads K and group members G")
    return jnp.reshape(x, (*before, K * G, *after))


def fold_heads(x: Array) -> Array:
    """Make heads part of the batch: `[B, T, N, H] -> [B·N, T, H]`.

    Head n of example b becomes row b·N + n.

    Args:
      x: `[B, T, N, H]`, any dtype.

    Returns:
      `[B·N, T, H]`, in the dtype of `x`.

    Raises:
      ValueError: x is not of rank 4.

    Example:
      >>> fold_heads(jnp.zeros((2, 5, 3, 4))).shape
      (6, 5, 4)
    """
    checks.assert_shapes(x=(x, "B T N H"))
    return rearrange(x, "B T N H -> (B N) T H")


def unfold_heads(x: Array, num_heads: int) -> Array:
    """Undo `fold_heads`: `[B·N, T, H] -> [B, T, N, H]`.

    Args:
      x: `[B·N, T, H]`, any dtype.
      num_heads: N.

    Returns:
      `[B, T, N, H]`, in the dtype of `x`.

    Raises:
      ValueError: x is not of rank 3, `num_heads` is not a positive integer, or the first axis is
        not divisible by it.

    Example:
      >>> unfold_heads(jnp.zeros((6, 5, 4)), 3).shape
      (2, 5, 3, 4)
    """
    checks.assert_shapes(x=(x, "B T H"))
    checks.assert_divisible(**{"the first axis of x": (x.shape[0], "num_heads", num_heads)})
    return rearrange(x, "(B N) T H -> B T N H", N=num_heads)


def repeat_lengths(lengths: Array, num_heads: int) -> Array:
    """Repeat lengths for folded heads, once per head: `[B] -> [B·N]`, or `[B, T] -> [B·N, T]`.

    Args:
      lengths: integers `[B]` or `[B, T]`.
      num_heads: N.

    Returns:
      Integers `[B·N]` or `[B·N, T]`.

    Raises:
      ValueError: `lengths` has another rank, or `num_heads` is not a positive integer.
      TypeError: `lengths` are not integers.

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


def _split_shape(x: Array, axis: int, count: int, what: str) -> tuple[tuple[int, ...], list[int]]:
    """The sizes before `axis`, and those from it on, of which `count` must be there."""
    if axis + count > 0 or -axis > jnp.ndim(x):
        raise ValueError(f"x must have the {what} at axis {axis}, got shape {jnp.shape(x)}")
    shape = jnp.shape(x)
    return shape[:axis], list(shape[axis:])
