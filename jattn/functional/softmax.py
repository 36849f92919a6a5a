"""The one masked fill and the one empty-row rule."""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import checks, dtypes

Array = jax.Array


def masked_softmax(
    scores: Array, mask: Array | None = None, *, lengths: Array | None = None
) -> Array:
    """Softmax over the last axis in which forbidden entries get exactly 0.

        weights[t, s] = mask[t, s] · exp(scores[t, s]) / Σ_r mask[t, r] · exp(scores[t, r])

    A row with no allowed entry is all zeros. (Code that fills with −1e6 makes such a row uniform
    instead.)

    Args:
      scores: `[..., T, S]`, floating point; float16 and bfloat16 are summed in float32.
      mask: boolean, broadcastable to `[..., T, S]`; True = may attend.
      lengths: integers `[...]` or `[..., T]`; entries s ≥ length are forbidden. Combines with
        `mask`.

    Returns:
      Weights of the shape and dtype of `scores`.

    Raises:
      ValueError: the mask does not broadcast, or a length lies outside 0 … S.
      TypeError: scores are not floating point, the mask is not boolean, lengths are not integers.

    Example:
      >>> masked_softmax(jnp.zeros((2, 1, 4)), lengths=jnp.array([1, 2]))
      Array([[[1. , 0. , 0. , 0. ]],
      <BLANKLINE>
             [[0.5, 0.5, 0. , 0. ]]], dtype=float32)
    """
    scores = jnp.asarray(scores)
    checks.assert_floating(scores=scores)
    checks.assert_shapes(scores=(scores, "... S" if lengths is None else "... T S"))
    allowed = None
    if mask is not None:
        allowed = jnp.asarray(mask)
        if allowed.dtype != bool:
            raise TypeError(f"mask must be boolean (True = may attend), got {allowed.dtype}")
        checks.assert_broadcastable("mask", allowed, scores.shape, "the scores [..., T, S]")
        allowed = allowed.reshape((1,) * (scores.ndim - allowed.ndim) + allowed.shape)
    if lengths is not None:
        within = _within(lengths, scores)
        allowed = within if allowed is None else allowed & within
    return softmax_and_logsumexp(scores, allowed)[0].astype(scores.dtype)


def _within(lengths: Any, scores: Array) -> Array:
    lengths = jnp.asarray(lengths)
    checks.assert_integers(lengths=lengths)
    *batch, T, S = scores.shape
    per_example, per_query = tuple(batch), (*batch, T)
    if lengths.shape not in {per_example, per_query}:
        must = f"lengths must be [...] = {per_example} or [..., T] = {per_query}"
        raise ValueError(f"{must}, got {lengths.shape}")
    checks.assert_in_range("lengths", lengths, 0, S, "S, the number of keys")
    per_row = lengths if lengths.ndim == scores.ndim - 1 else lengths[..., None]
    slots = jnp.arange(S, dtype=jnp.int32).reshape((1,) * (scores.ndim - 1) + (S,))
    return slots < dtypes.lengths(per_row)[..., None]


def softmax_and_logsumexp(scores: Array, mask: Array | None) -> tuple[Array, Array]:
    """The masked softmax over the last axis together with log Σ exp of the allowed scores.

    A score of −inf is as good as forbidden. A row with nothing else has weights of zero, a
    log-sum-exp of −inf, and zero gradients. Forbidden scores may be anything, NaN included.

    Args:
      scores: `[..., S]`, floating point.
      mask: boolean, broadcastable to `[..., S]` and of its rank, or None.

    Returns:
      Weights `[..., S]` and log-sum-exp `[...]`, in the dtype in which sums are kept (at least
      float32).

    Example:
      >>> softmax_and_logsumexp(jnp.zeros(2), jnp.array([False, False]))
      (Array([0., 0.], dtype=float32), Array(-inf, dtype=float32))
    """
    scores = scores.astype(dtypes.accumulator(scores.dtype))
    lowest = jnp.finfo(scores.dtype).min  # in place of −inf, which has no difference from itself
    if mask is not None:
        scores = jnp.where(mask, scores, lowest)
    maximum = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=lowest))
    exponentials = jnp.exp(scores - maximum)
    if mask is not None:
        exponentials = jnp.where(mask, exponentials, 0)
    total = exponentials.sum(-1, keepdims=True)
    divisor = jnp.where(total == 0, 1, total)  # also keeps the gradient of the logarithm finite
    logsumexp = jnp.where(total == 0, -jnp.inf, maximum + jnp.log(divisor))
    return exponentials / divisor, logsumexp.squeeze(-1)
