"""NVIDIA's fused attention through `jax.nn.dot_product_attention`, for the requests that it honours exactly.

Those are scaled dot products of half-precision operands without modifiers, dropout or weights, under no mask or under
`causal()` with T = S: there every query sees a key and every key is seen, so that no rule about empty or hidden rows is
in question. For everything else it raises `NotImplementedError`. It is taken where it is asked for by name alone: JAX's
rule for it fails under a `vmap` that maps some operands and not others, and on no platform but its own does it lower.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jattn.functional import masks, scores
from jattn.functional.masks import Mask
from jattn.functional.modifiers import Modifier

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
) -> tuple[Array, None, None]:
    """As `dense.attend`, by cuDNN.

    Raises:
      NotImplementedError: names what cuDNN does not do, or does in another way.
    """
    scale, causal = _scale(score, query.shape[-1]), _is_causal(mask, query, key)
    reasons = {
        f"platform {jax.default_backend()}": jax.default_backend() != "gpu",
        f"dtype {query.dtype}": query.dtype not in (jnp.float16, jnp.bfloat16),
        "a score other than scaled_dot_product with a constant scale": scale is None,
        f"mask {mask!r}": mask is not None and not causal,
        "modifier": bool(modifiers),
        "positions": positions is not None and mask is not None,
        "dropout": dropout_rate > 0,
        "return_lse": return_lse,
        "return_weights": return_weights,
        "values of another width than keys": key.shape[-1] != value.shape[-1],
        "no rows": 0 in (query.size, key.size),
    }
    lacking = [reason for reason, given in reasons.items() if given]
    if lacking:
        raise NotImplementedError(f"cudnn: {', '.join(lacking)}")
    batch = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    try:
        output = jax.nn.dot_product_attention(*batch, scale=scale, is_causal=causal, implementation="cudnn")
    except RuntimeError as error:  # no cuDNN
        raise NotImplementedError(f"cudnn: {error}") from error
    return checkpoint_name(output.reshape(query.shape), "attend_output"), None, None


def _scale(score: Any, width: int) -> float | None:
    """The factor of a scaled dot product; None where the score is another, or its scale an array."""
    options: dict[str, Any] = {}
    if isinstance(score, functools.partial) and not score.args:
        score, options = score.func, score.keywords
    scale = options.get("scale")
    if score is not scores.scaled_dot_product or not set(options) <= {"scale"}:
        return None
    return width**-0.5 if scale is None else float(scale) if isinstance(scale, (int, float)) else None


def _is_causal(mask: Mask | None, query: Array, key: Array) -> bool:
    offset = getattr(mask, "offset", None)
    square = query.shape[-3] == key.shape[-3]
    return square and isinstance(mask, type(masks.causal())) and isinstance(offset, int) and offset == 0
