"""attend inside Flax's own attention module."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jattn.attention import attend
from jattn.functional import masks, modifiers, scores
from jattn.nn._shared import joined_masks, joined_modifiers
from jattn.request import MaskLike, ModifierLike

Array = jax.Array


def attention_fn(
    *,
    score: Any = scores.scaled_dot_product,
    mask: MaskLike = None,
    modifier: ModifierLike = None,
    implementation: str | None = None,
) -> Any:
    """An `attention_fn` for `flax.nnx.MultiHeadAttention`, or Linen's, that calls `attend`.

    Args:
      score: as in `attend`.
      mask: allowed pairs in addition to the mask that Flax passes.
      modifier: as in `attend`, applied before Flax's bias.
      implementation: as in `attend`.

    Returns:
      A function with the signature of `flax.nnx.dot_product_attention`. It promotes by Flax's
      `promote_dtype` or the user's, and multiplies at Flax's `precision`; of a pair, one for each
      operand, at the higher one. `broadcast_dropout=True` drops what Flax drops from the same key.

    Raises:
      NotImplementedError: Flax passes an einsum or a `dot_general` of the user's: `attend` makes
        its products itself.

    Example:
      >>> import jax.numpy as jnp
      >>> capped = attention_fn(modifier=modifiers.soft_cap(30.0))
      >>> rngs = nnx.Rngs(0)
      >>> flax_module = nnx.MultiHeadAttention(4, 8, attention_fn=capped, decode=False, rngs=rngs)
      >>> flax_module(jnp.ones((2, 5, 8))).shape
      (2, 5, 8)
    """
    own = {"score": score, "mask": mask, "modifier": modifier, "implementation": implementation}
    return functools.partial(_attend_for_flax, own)


def _attend_for_flax(
    own: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    module: Any = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,  # it always is at least float32
    precision: Any = None,
    promote_dtype: Any = promote_dtype,
    # Linen passes only what this signature names: what is refused has to be named
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    qk_attn_weights_einsum_cls: Any = None,
    attn_weights_value_einsum_cls: Any = None,
) -> Array:
    _refuse(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum or qk_attn_weights_einsum_cls,
        attn_weights_value_einsum=attn_weights_value_einsum or attn_weights_value_einsum_cls,
    )
    arrays = promote_dtype((query, key, value), dtype=dtype)
    run: Any = functools.partial(
        attend,
        score=own["score"],
        modifier=joined_modifiers(own["modifier"], None if bias is None else modifiers.bias(bias)),
        precision=_highest(precision),
        implementation=own["implementation"],
    )
    joined = joined_masks(
        own["mask"],
        None if mask is None else mask.astype(bool),
        masks.causal() if is_causal else None,
    )
    drops = dropout_rate > 0 and not deterministic
    asked: dict[str, Any] = {"mask": joined, "return_weights": module is not None}
    if drops and broadcast_dropout:
        result = _dropped_alike(run, arrays, dropout_rate, dropout_rng, **asked)
    else:
        if drops:
            asked |= {"dropout_rate": dropout_rate, "dropout_key": dropout_rng}
        result = run(*arrays, **asked)
    if not isinstance(result, tuple):  # no module, so no weights
        return result
    output, weights = result
    kind: Any = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(kind, "attention_weights", weights)
    return output


def _dropped_alike(
    run: Callable[..., Any], arrays: Any, rate: float, key: Any, *, mask: Any, return_weights: bool
) -> Any:
    """The output, and the weights before dropout, where all examples and heads drop the same pairs.

    A dropped pair is one that is forbidden after the softmax, over whose sum it still counts:

        output = attend(mask & kept) · exp(lse of kept − lse of all) / (1 − rate)
    """
    if key is None:
        raise ValueError(f"dropout_rate = {rate} needs a dropout_rng, got None")
    query, keys, _ = arrays
    batch = (1,) * (query.ndim - 2)
    keep = jax.random.bernoulli(key, 1 - rate, (*batch, query.shape[-3], keys.shape[-3]))
    _, whole, *weights = run(*arrays, mask=mask, return_lse=True, return_weights=return_weights)
    kept = joined_masks(mask, keep.reshape(keep.shape[-2:]))
    output, part = run(*arrays, mask=kept, return_lse=True)
    is_empty = jnp.isneginf(part)  # −∞ − −∞ is NaN
    share = jnp.where(is_empty, 0, jnp.exp(jnp.where(is_empty, 0, part - whole)))
    scaled = output * (share / ((1 - rate) or 1))[..., None].astype(output.dtype)
    return (scaled, *weights) if return_weights else scaled


def _highest(precision: Any) -> Any:
    """One precision of a product for the one or the pair that Flax has."""
    if not isinstance(precision, tuple):
        return precision
    return max(map(jax.lax.Precision, precision), key=lambda level: level.value)


def _refuse(**options: Any) -> None:
    for name, given in options.items():
        if given is not None:
            raise NotImplementedError(f"attend makes its products itself: {name} has no effect")
