"""Array operations of kernels, with heads before lengths: `[..., N, T, H]`, `[..., K, S, H']`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jattn.functional import checks, dtypes
from jattn.functional.heads import group_heads, ungroup_heads
from jattn.functional.products import grouped_product

Array = jax.Array


def heads_first(x: Array) -> Array:
    """The layout in which kernels compute: `[..., T, N, H] -> [..., N, T, H]`."""
    return rearrange(x, "... T N H -> ... N T H")


def heads_last(x: Array) -> Array:
    """Back to the layout of arguments and results: `[..., N, T, H] -> [..., T, N, H]`."""
    return rearrange(x, "... N T H -> ... T N H")


def head_scores(score: Callable[[Array, Array], Any], query: Array, key: Array) -> Array:
    """Evaluate a score for every head, without repeating keys: `[..., N, T, S]`, float32 at least.

    Args:
      score: takes `[..., N, T, H]` and `[..., K, S, H']` where N = K, otherwise
        `[..., K, G, T, H]` and `[..., K, 1, S, H']`.
      query: `[..., N, T, H]`.
      key: `[..., K, S, H']`.
    """
    *batch, N, T, _ = query.shape
    K, S = key.shape[-3:-1]
    if N == K:
        scores, expected = score(query, key), (*batch, N, T, S)
    else:
        grouped = group_heads(query, K, axis=-3)
        scores, expected = score(grouped, key[..., None, :, :]), (*batch, K, N // K, T, S)
    if not hasattr(scores, "shape"):
        got = type(scores).__name__
        raise TypeError(f"score must return an array [..., T, S] = {expected}, got a {got}")
    if scores.shape != expected:
        each = f"score must return [..., T, S] for each head, {expected}"
        raise ValueError(f"{each}, got {scores.shape}")
    checks.assert_floating(**{"the result of score": scores})
    return scores.reshape(*batch, N, T, S).astype(dtypes.accumulator(scores.dtype))


def pool(weights: Array, value: Array) -> Array:
    """Weighted sums of values: `[..., N, T, S], [..., K, S, V] -> [..., N, T, V]`.

    Half-precision values are multiplied without a cast and summed in float32: see `product`.
    """
    weights = weights.astype(dtypes.accumulator(value.dtype))
    grouped = group_heads(weights, num_kv_heads=value.shape[-3], axis=-3)
    return ungroup_heads(grouped_product(grouped, value, (-1, -2)), axis=-4)


def hide(rows: Array, seen: Array | None) -> Array:
    """Replace hidden entries by zeros, so that the result does not depend on them."""
    return rows if seen is None else jnp.where(seen, rows, jnp.zeros((), rows.dtype))


def keys_seen(allowed: Array | None, num_kv_heads: int) -> Array | None:
    """Which keys some query may attend to: broadcastable to `[..., K, S, 1]`."""
    if allowed is None:
        return None
    seen = allowed.any(-2)  # [..., N or 1, S or 1]
    if seen.shape[-2] > 1:
        seen = group_heads(seen, num_kv_heads).any(-2)
    return seen[..., None]


def queries_seen(allowed: Array | None) -> Array | None:
    """Which queries may attend to some key: broadcastable to `[..., N, T, 1]`."""
    return None if allowed is None else allowed.any(-1, keepdims=True)
