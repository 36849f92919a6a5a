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
    dropped = weights if dropout_rate == 0 or dropout_key is None else drop(weights, block, dropout_rate, dropout_key)
    output = _pool(dropped, hide(value, keys_seen(allowed, value)))
    lse = checkpoint_name(rearrange(lse, "... N T -> ... T N"), "attend_lse")
    return checkpoint_name(output, "attend_output"), lse, weights if return_weights else None


def attention_weights(
    query: Array,
    key: Array,
    *,
    score: Callable[[Array, Array], Array],
    allowed: Array | None,
    modifiers: Sequence[Modifier],
    block: Block,
) -> tuple[Array, Array]:
    """Weights `[..., N, T, S]` and log-sum-exp `[..., N, T]` of one block, in the dtype in which sums are kept."""
    query = hide(query, queries_seen(allowed, query))
    key = hide(key, keys_seen(allowed, key))
    scores = head_scores(score, query, key)
    for modifier in modifiers:
        scores = modifier.rule(scores, block)
    return softmax_and_logsumexp(scores, allowed)


def head_scores(score: Callable[[Array, Array], Array], query: Array, key: Array) -> Array:
    """Evaluate a score for every head: `[..., T, N, H], [..., S, K, H'] -> [..., N, T, S]`; keys are not repeated."""
    T, N, S, K = query.shape[-3], query.shape[-2], key.shape[-3], key.shape[-2]
    if N == K:
        scores = score(rearrange(query, "... T N H -> ... N T H"), rearrange(key, "... S N H -> ... N S H"))
        heads: tuple[int, ...] = (N,)
    else:
        grouped = rearrange(query, "... T (K G) H -> ... K G T H", K=K)
        scores = score(grouped, rearrange(key, "... S K H -> ... K 1 S H"))
        heads = (K, N // K)
    expected = (*query.shape[:-3], *heads, T, S)
    if scores.shape != expected:
        raise ValueError(f"score must return [..., T, S] for each head, {expected}, got {scores.shape}")
    checks.floating(**{"the result of score": scores})
    scores = scores.reshape(*query.shape[:-3], N, T, S)
    return scores.astype(checks.accumulator(jnp.result_type(query, key)))


def _pool(weights: Array, value: Array) -> Array:
    """Weighted means of the values, `[..., T, N, V]`, summed in the dtype of the weights."""
    grouped = rearrange(weights, "... (K G) T S -> ... K G T S", K=value.shape[-2])
    output = jnp.einsum("...kgts,...skv->...tkgv", grouped, value.astype(weights.dtype))
    return rearrange(output, "... T K G V -> ... T (K G) V").astype(value.dtype)


def hide(rows: Array, seen: Array | None) -> Array:
    """Replace hidden rows `[..., length, heads, width]` by zeros, so that whatever they hold reaches nothing."""
    return rows if seen is None else jnp.where(seen, rows, 0)


def keys_seen(allowed: Array | None, key: Array) -> Array | None:
    """Which keys some query may attend to: broadcastable to `[..., S, K, 1]`."""
    if allowed is None:
        return None
    seen = allowed.any(-2)  # [..., N or 1, S or 1]
    if seen.shape[-2] > 1:
        seen = rearrange(seen, "... (K G) S -> ... K G S", K=key.shape[-2]).any(-2)
    return rearrange(seen, "... K S -> ... S K 1")


def queries_seen(allowed: Array | None, query: Array) -> Array | None:
    """Which queries may attend to some key: broadcastable to `[..., T, N, 1]`."""
    return None if allowed is None else rearrange(allowed.any(-1), "... N T -> ... T N 1")
