"""What kernels do to arrays, with heads before lengths: query `[..., N, T, H]`, key `[..., K, S, H']`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jattn.functional import checks

Array = jax.Array


def heads_first(x: Array) -> Array:
    """The layout in which kernels compute: `[..., T, N, H] -> [..., N, T, H]`."""
    return rearrange(x, "... T N H -> ... N T H")


def heads_last(x: Array) -> Array:
    """Back to the layout of arguments and results: `[..., N, T, H] -> [..., T, N, H]`."""
    return rearrange(x, "... N T H -> ... T N H")


def head_scores(score: Callable[[Array, Array], Array], query: Array, key: Array) -> Array:
    """Evaluate a score for every head: `[..., N, T, H], [..., K, S, H'] -> [..., N, T, S]`; keys are not repeated."""
    *lead, N, T, _ = query.shape
    K, S = key.shape[-3:-1]
    if N == K:
        scores, expected = score(query, key), (*lead, N, T, S)
    else:
        grouped = rearrange(query, "... (K G) T H -> ... K G T H", K=K)
        scores, expected = score(grouped, key[..., None, :, :]), (*lead, K, N // K, T, S)
    if scores.shape != expected:
        raise ValueError(f"score must return [..., T, S] for each head, {expected}, got {scores.shape}")
    checks.floating(**{"the result of score": scores})
    return scores.reshape(*lead, N, T, S).astype(checks.accumulator(jnp.result_type(query, key)))


def pool(weights: Array, value: Array) -> Array:
    """Weighted sums of values: `[..., N, T, S], [..., K, S, V] -> [..., N, T, V]`, in the dtype of the weights."""
    grouped = rearrange(weights, "... (K G) T S -> ... K (G T) S", K=value.shape[-3])
    pooled = jnp.einsum("...kts,...ksv->...ktv", grouped, value.astype(weights.dtype))
    return rearrange(pooled, "... K (G T) V -> ... (K G) T V", G=weights.shape[-3] // value.shape[-3])


def hide(rows: Array, seen: Array | None) -> Array:
    """Replace hidden rows by zeros, so that whatever they hold reaches nothing."""
    return rows if seen is None else jnp.where(seen, rows, 0)


def keys_seen(allowed: Array | None, num_kv_heads: int) -> Array | None:
    """Which keys some query may attend to: broadcastable to `[..., K, S, 1]`."""
    if allowed is None:
        return None
    seen = allowed.any(-2)  # [..., N or 1, S or 1]
    if seen.shape[-2] > 1:
        seen = rearrange(seen, "... (K G) S -> ... K G S", K=num_kv_heads).any(-2)
    return seen[..., None]


def queries_seen(allowed: Array | None) -> Array | None:
    """Which queries may attend to some key: broadcastable to `[..., N, T, 1]`."""
    return None if allowed is None else allowed.any(-1, keepdims=True)


def outer(cotangent: Array, value: Array) -> Array:
    """Cotangent of the weights: `[..., N, T, V], [..., K, S, V] -> [..., N, T, S]`."""
    grouped = rearrange(cotangent, "... (K G) T V -> ... K (G T) V", K=value.shape[-3])
    outer = jnp.einsum("...ktv,...ksv->...kts", grouped, value)
    return rearrange(outer, "... K (G T) S -> ... (K G) T S", G=cotangent.shape[-3] // value.shape[-3])


def pool_turned(weights: Array, cotangent: Array) -> Array:
    """Cotangent of the value, columns first: `[..., N, T, S], [..., K, V, G · T] -> [..., K, V, S]`."""
    grouped = rearrange(weights, "... (K G) T S -> ... K (G T) S", K=cotangent.shape[-3])
    return jnp.einsum("...kvt,...kts->...kvs", cotangent, grouped)


def read(array: Array, start: Any, size: int, axis: int = -3) -> Array:
    """The part of an axis from `start` on."""
    return array if size == array.shape[axis] else jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def write(array: Array, part: Array, start: Any, axis: int = -3) -> Array:
    """The array with a part of an axis replaced."""
    return part if part.shape == array.shape else jax.lax.dynamic_update_slice_in_dim(array, part, start, axis)


def add(array: Array, part: Array, start: Any, axis: int = -3) -> Array:
    """The array with something added to a part of an axis."""
    return write(array, read(array, start, part.shape[axis], axis) + part, start, axis)


def turned(array: Array) -> Array:
    """Columns first."""
    return rearrange(array, "... length width -> ... width length")
