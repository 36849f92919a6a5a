"""attend inside Flax's own attention module."""

import functools
from typing import Any

import jax
from flax import nnx

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
      A function with the signature of `flax.nnx.dot_product_attention`. Flax broadcasts dropout
      over batch axes by default; here every weight is dropped on its own, so
      `broadcast_dropout=True` with dropout on is an error.

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
    # Linen passes only what this signature names: what attend cannot do has to be named to be
    # refused
    precision: Any = None,
    promote_dtype: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    qk_attn_weights_einsum_cls: Any = None,
    attn_weights_value_einsum_cls: Any = None,
) -> Array:
    _refuse(
        {
            "precision (see jax.default_matmul_precision)": precision,
            "promote_dtype": promote_dtype,
            "an einsum of one's own (write a score)": qk_attn_weights_einsum
            or qk_attn_weights_einsum_cls,
            "an einsum of the values": attn_weights_value_einsum or attn_weights_value_einsum_cls,
        }
    )
    drops = dropout_rate > 0 and not deterministic
    if drops and broadcast_dropout:
        raise NotImplementedError(
            "attend drops each weight on its own: pass broadcast_dropout=False"
        )
    if dtype is not None:
        query, key, value = (array.astype(dtype) for array in (query, key, value))
    result = attend(
        query, key, value,
        score=own["score"],
        mask=joined_masks(
            own["mask"],
            None if mask is None else mask.astype(bool),
            masks.causal() if is_causal else None,
        ),
        modifier=joined_modifiers(
            own["modifier"], None if bias is None else modifiers.bias(bias)
        ),
        dropout_rate=dropout_rate if drops else 0.0,
        dropout_key=dropout_rng if drops else None,
        implementation=own["implementation"],
        return_weights=module is not None,
    )  # fmt: skip
    if not isinstance(result, tuple):  # no module, so no weights
        return result
    module.sow(
        nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates",
        "attention_weights",
        result[1],
    )
    return result[0]


def _refuse(options: dict[str, Any]) -> None:
    for name, given in options.items():
        if given is not None:
            raise NotImplementedError(f"attend takes no {name}")
