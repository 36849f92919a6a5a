"""The readable kernel: all scores at once. It is the specification that the others are held to.

weights = masked softmax(modifier(score(query, key)), mask),   output = dropout(weights) · value
"""

from collections.abc import Callable, Sequence

import jax
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jattn.functional.blocks import Block
from jattn.functional.masks import Mask
from jattn.functional.modifiers import Modifier
from jattn.functional.softmax import softmax_and_logsumexp
from jattn.kernels.arrays import head_scores, heads_first, hide, keys_seen, pool, queries_seen
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
    return_lse: bool,
    return_weights: bool,
) -> tuple[Array, Array, Array | None]:
    """Attention over checked arguments of one dtype; `jattn.attend` checks and documents them.

    Returns:
      Output `[..., T, N, V]`, log-sum-exp `[..., T, N]`, and the weights `[..., N, T, S]` before dropout or None. (A
      kernel that has to work for the log-sum-exp may return None if it was not asked for.)
    """
    *lead, T, N, _ = query.shape
    block = Block(tuple(lead), N, (0, T), (0, key.shape[-3]), positions)
    allowed = None if mask is None else mask.rule(block)
    weights, lse = attention_weights(query, key, score=score, allowed=allowed, modifiers=modifiers, block=block)
    value = heads_first(value)
    dropped = weights if dropout_rate == 0 else drop(weights, block, dropout_rate, dropout_key)
    output = pool(dropped, hide(value, keys_seen(allowed, value.shape[-3]))).astype(value.dtype)
    output = hide(output, queries_seen(allowed))  # zeros already, but a NaN cotangent would reach the values
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
    # Forbidden scores become zeros before they are modified, lest a NaN made of them turn up in a gradient
    scores = hide(head_scores(score, query, key), allowed)
    for modifier in modifiers:
        scores = modifier.rule(scores, block)
    return softmax_and_logsumexp(scores, allowed)
