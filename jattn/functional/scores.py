"""A score says how well a query and a key fit.

Each score is a function `(query [..., T, H], key [..., S, H']) -> [..., T, S]`.

A score is pairwise: entry (t, s) depends on row t of the query and row s of the key alone.
Parameters are further arguments; bind them with `functools.partial`, `jax.tree_util.Partial` or a
closure before handing a score to `attend`.

In `attend` the leading axes are `[..., N]`, and where N query heads share K < N key heads
`[..., K, G]` for the query and `[..., K, 1]` for the key. Parameters are shared by all heads, or
have a leading axis of N heads; a score does not depend on the example.

Query and key come in the dtype in which the caller of `attend` gave them, in every kernel. The
scores here multiply half precision as it comes and keep sums in float32, which is then the dtype of
the result. A score of yours may return any floating dtype; what follows it is float32 at least.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import checks, dtypes
from jattn.functional.products import grouped_product, product

Array = jax.Array


def constant(query: Array, key: Array) -> Array:
    """The same score for every key, so that attention is the mean of the allowed values.

        a(q, k) = 0

    Args:
      query: `[..., T, H]`, floating point.
      key: `[..., S, H']`, floating point.

    Returns:
      Zeros `[..., T, S]`.

    Example:
      >>> constant(jnp.ones((1, 3)), jnp.ones((2, 5)))
      Array([[0., 0.]], dtype=float32)
    """
    query, key = _pair(query, key, same_width=False)
    batch = jnp.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return jnp.zeros((*batch, query.shape[-2], key.shape[-2]), query.dtype)


def dot_product(query: Array, key: Array) -> Array:
    """The inner product.

        a(q, k) = qᵀk

    Args:
      query: `[..., T, H]`, floating point.
      key: `[..., S, H]`, floating point.

    Returns:
      `[..., T, S]`.

    Raises:
      ValueError: the widths differ.

    Paper: Luong et al. 2015, https://arxiv.org/abs/1508.04025

    Example:
      >>> dot_product(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))
      Array([[11.]], dtype=float32)
    """
    query, key = _pair(query, key, widen=False)
    return _products(query, key)


def scaled_dot_product(query: Array, key: Array, scale: float | Array | None = None) -> Array:
    """The inner product over the square root of the width.

        a(q, k) = qᵀk / √H

    The division keeps its variance from growing with H.

    Args:
      query: `[..., T, H]`, floating point.
      key: `[..., S, H]`, floating point.
      scale: a factor to use instead of 1 / √H: a scalar, or `[N]` with one per head.

    Returns:
      `[..., T, S]`.

    Raises:
      ValueError: the widths differ.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> scaled_dot_product(jnp.ones((1, 4)), jnp.ones((1, 4)))
      Array([[2.]], dtype=float32)
    """
    query, key = _pair(query, key, widen=False)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else _factor(scale, query, key)
    if dtypes.is_half(query.dtype) and not _is_power_of_two(factor):
        return _products(query, key) * factor  # a scaled query would lose digits
    return _products(query * factor, key)  # T × H products instead of T × S


def bilinear(query: Array, key: Array, weight: Array) -> Array:
    """The multiplicative ("general") score: an inner product through a learned matrix.

        a(q, k) = qᵀ W k

    Args:
      query: `[..., T, H]`, floating point.
      key: `[..., S, H']`, floating point.
      weight: `[H, H']`, or `[N, H, H']` with one matrix per head.

    Returns:
      `[..., T, S]`.

    Raises:
      ValueError: the weight does not fit the widths or the heads.

    Paper: Luong et al. 2015, https://arxiv.org/abs/1508.04025

    Example:
      >>> bilinear(jnp.ones((1, 2)), jnp.ones((1, 3)), jnp.ones((2, 3)))
      Array([[6.]], dtype=float32)
    """
    query, key = _pair(query, key, same_width=False, widen=False)
    weight = _per_head(weight, query, key, (query.shape[-1], key.shape[-1]))
    projected = product(query, weight, (-1, -2))  # qᵀ W
    return _products(projected, key)


def additive(query: Array, key: Array, weight: Array) -> Array:
    """Bahdanau's score of a query and a key that are already projected to one width.

        a(q, k) = wᵀ tanh(q + k)

    Args:
      query: `[..., T, H]`, floating point: W_q q.
      key: `[..., S, H]`, floating point: W_k k.
      weight: `[H]`, or `[N, H]` with one vector per head.

    Returns:
      `[..., T, S]`.

    Raises:
      ValueError: the widths differ, or the weight does not fit them or the heads.

    Paper: Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473

    Example:
      >>> additive(jnp.ones((1, 2)), -jnp.ones((1, 2)), jnp.ones(2))
      Array([[0.]], dtype=float32)
    """
    query, key = _pair(query, key)
    weight = _per_head(weight, query, key, query.shape[-1:])
    # No matrix product: this sum fuses with the tanh, and [..., T, S, H] is never written out
    hidden = jnp.tanh(query[..., :, None, :] + key[..., None, :, :])
    return (hidden * weight[..., None, None, :]).sum(-1)


def gaussian(query: Array, key: Array, weight: float | Array = 1.0) -> Array:
    """The exponent of the Gaussian kernel, with which attention is Nadaraya-Watson regression.

        a(q, k) = −‖(q − k) · w‖² / 2

    Differences are taken before squaring, so that close points keep their digits.

    Args:
      query: `[..., T, H]`, floating point.
      key: `[..., S, H]`, floating point.
      weight: the inverse bandwidth: a scalar, `[H]`, or `[N, H]` with one vector per head.

    Returns:
      `[..., T, S]`.

    Raises:
      ValueError: the widths differ, or the weight does not fit them or the heads.

    Paper: Nadaraya 1964, https://doi.org/10.1137/1109020

    Example:
      >>> gaussian(jnp.array([[1.0]]), jnp.array([[3.0]]))
      Array([[-2.]], dtype=float32)
    """
    query, key = _pair(query, key)
    difference = query[..., :, None, :] - key[..., None, :, :]
    if jnp.ndim(weight) > 0:
        weight = _per_head(weight, query, key, query.shape[-1:])[..., None, None, :]
    else:
        weight = _factor(weight, query, key)
    return -jnp.square(difference * weight).sum(-1) / 2


def cosine(query: Array, key: Array, scale: float | Array = 1.0) -> Array:
    """The cosine of the angle between query and key.

        a(q, k) = scale · qᵀk / (‖q‖ ‖k‖)

    Where either is the zero vector, it is 0 and so is its derivative.

    Args:
      query: `[..., T, H]`, floating point.
      key: `[..., S, H]`, floating point.
      scale: a factor, the inverse temperature: a scalar, or `[N]` with one per head.

    Returns:
      `[..., T, S]`.

    Raises:
      ValueError: the widths differ.

    Paper: Graves et al. 2014, https://arxiv.org/abs/1410.5401

    Example:
      >>> cosine(jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0], [-4.0, 3.0]])).round(2)
      Array([[0.96, 0.  ]], dtype=float32)
    """
    dtype = _pair(query, key, widen=False)[0].dtype
    query, key = _pair(query, key)
    return _products(_unit(query), _unit(key), dtype) * _factor(scale, query, key)


def _unit(vector: Array) -> Array:
    # Squares of very large or small numbers leave the range of the dtype: divide by the largest
    # entry first. The reciprocal of a number near the end of the range would do so, too.
    largest = jax.lax.stop_gradient(jnp.abs(vector).max(-1, keepdims=True, initial=0))
    step = jnp.where(largest > 1, 1 / 16, 16).astype(vector.dtype)
    vector = vector * step / jnp.where(largest > 0, largest * step, 1)
    squared = jnp.square(vector).sum(-1, keepdims=True)
    return jnp.where(largest > 0, vector / jnp.sqrt(jnp.where(largest > 0, squared, 1)), 0)


def _pair(
    query: Array, key: Array, same_width: bool = True, widen: bool = True
) -> tuple[Array, Array]:
    """Check a query and a key and promote both to one dtype, at least float32 where `widen`."""
    query, key = jnp.asarray(query), jnp.asarray(key)
    checks.assert_floating(query=query, key=key)
    checks.assert_shapes(query=(query, "... T H"))
    checks.assert_shapes(key=(key, "... S H"))
    if same_width and query.shape[-1] != key.shape[-1]:
        shapes = f"got shapes {query.shape} and {key.shape}"
        raise ValueError(f"query and key must have one width H, {shapes}")
    dtype = jnp.promote_types(query.dtype, key.dtype)
    dtype = dtypes.accumulator(dtype) if widen else dtype
    return query.astype(dtype), key.astype(dtype)


def _products(query: Array, key: Array, dtype: Any = None) -> Array:
    """Inner products of all rows; heads that share a key make one matrix product."""
    is_shared = query.ndim == key.ndim > 2 and key.shape[-3] == 1 != query.shape[-3]
    key = key[..., 0, :, :] if is_shared else key
    contract = -1, -1
    if query.shape[-2] == 1:  # a cache keeps its keys [..., H, S]: read as they lie
        key, contract = key.mT, (-1, -2)
    return (grouped_product if is_shared else product)(query, key, contract, dtype)


def _is_power_of_two(factor: Any) -> bool:
    return isinstance(factor, (int, float)) and abs(math.frexp(factor)[0]) in (0, 0.5)


def _factor(scale: Any, query: Array, key: Array) -> Any:
    if jnp.ndim(scale) > 0:
        return _per_head(scale, query, key, ())[..., None, None]
    if not hasattr(scale, "dtype"):
        return scale
    return jnp.asarray(scale, dtypes.accumulator(query.dtype))


def _per_head(weight: Any, query: Array, key: Array, shape: tuple[int, ...]) -> Array:
    """Align a weight `shape` or `[N, *shape]` with a query's leading axes, `[..., N]` or grouped.

    Grouped, these are `[..., K, G]`; axes along which the weight is shared have size 1.
    """
    weight = jnp.asarray(weight)
    checks.assert_floating(weight=weight)
    grouped = query.ndim > 3 and query.ndim == key.ndim and key.shape[-3] == 1 < query.shape[-3]
    heads = query.shape[-4:-2] if grouped else query.shape[-3:-2]
    if weight.shape == shape:
        heads = ()
    elif not heads or weight.shape != (math.prod(heads), *shape):
        per_head = f", or {(math.prod(heads), *shape)} with one per head" if heads else ""
        raise ValueError(f"weight must be {shape}{per_head}, got shape {weight.shape}")
    shared = (1,) * (query.ndim - 2 - len(heads))
    return weight.reshape(*shared, *heads, *shape).astype(dtypes.accumulator(query.dtype))
