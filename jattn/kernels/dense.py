"""The readable kernel: all scores at once. It is the specification that the others are held to.

weights = masked softmax(modifier(score(query, key)), mask),   output = dropout(weights) · value
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jattn.functional import checks
from jattn.functional.blocks import Block
from jattn.functional.masks import Mask
from jattn.functional.modifiers import Modifier
from jattn.functional.softmax import softmax_and_logsumexp
from jattn.kernels.dropout import drop

Array = jax.Array


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    score: Callable[[Array, Array], Array],
    mask: Mask | None,
    modifiers: Sequence[Modifier],
    positions: tuple[Array, Array] | None,
    dropout_rate: float,
    dropout_key: Array | None,
    return_weights: bool,
) -> tuple[Array, Array, Array | None]:
    """Attention over checked arguments of one dtype; `jattn.attend` checks and documents them.

    Returns:
      Output `[..., T, N, V]`, log-sum-exp `[..., T, N]`, and the weights `[..., N, T, S]` before dropout or None.
    """
    *lead, T, N, _ = query.shape
    block = Block(tuple(lead), N, (0, T), (0, key.shape[-3]), positions)
    allowed = None if mask is None else mask.rule(block)
    weights, lse = attention_weights(query, key, score=score, allowed=allowed, modifiers=modifiers, block=block)
    value = heads_first(value)
    dropped = weights if dropout_rate == 0 or dropout_key is None else drop(weights, block, dropout_rate, dropout_key)
    output = pool(dropped, hide(value, keys_seen(allowed, value.shape[-3]))).astype(value.dtype)
    output = checkpoint_name(rearrange(output, "... N T V -> ... T N V"), "attend_output")
    lse = checkpoint_name(rearrange(lse, "... N T -> ... T N"), "attend_lse")
    return output, lse, weights if return_weights else None


def attention_weights(
    query: Array,
    key: Array,
    *,
    score: Callable[[Array, Array], Array],
    allowed: Array | None,
    modifiers: Sequence[Modifier],
    block: Block,
) -> tuple[Array, Array]:
    """Weights `[..., N, T, S]` and log-sum-exp `[..., N, T]`, in the dtype in which sums are kept."""
    query, key = heads_first(query), heads_first(key)
    query = hide(query, queries_seen(allowed))
    key = hide(key, keys_seen(allowed, key.shape[-3]))
    scores = head_scores(score, query, key)
    for modifier in modifiers:
        scores = modifier.rule(scores, block)
    return softmax_and_logsumexp(scores, allowed)


def heads_first(x: Array) -> Array:
    """The layout in which kernels compute: `[..., T, N, H] -> [..., N, T, H]`."""
    return rearrange(x, "... T N H -> ... N T H")


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
    return rearrange(pooled, "... K (G T) V -> ... (K G) T V", T=weights.shape[-2])


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
