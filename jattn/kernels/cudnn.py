"""NVIDIA's fused attention, through `jax.nn.dot_product_attention`.

It takes only requests that it computes exactly: scaled dot products of half-precision operands
without modifiers, dropout, log-sum-exp or weights, without a mask or with `causal()` where T = S.
There every query sees a key and a query sees every key, so that jattn's rules for rows without one
do not apply.

It lacks forward mode, second derivatives, a `vmap` over some operands and not others, and platforms
other than CUDA. So `attend` runs it only by name: `implementation="cudnn"`, or first of several,
`implementation=("cudnn", "blockwise")`.
"""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jattn.functional import dtypes, masks, scores
from jattn.request import Request, Result


def refuses(request: Request) -> str | None:
    """Why this kernel cannot do what is asked; None if it can."""
    query, key, value, mask = request.query, request.key, request.value, request.mask
    width, scale = query.shape[-1], _scale(request.score, query.shape[-1])
    reasons = {
        f"it runs on NVIDIA GPUs, not on {jax.default_backend()}": jax.default_backend() != "gpu",
        f"it multiplies half precision, not {query.dtype}": not dtypes.is_half(query.dtype),
        "it has no score but scaled_dot_product with a constant scale": scale is None,
        f"it has no mask but causal() with T = S, not {mask!r}": mask is not None
        and not _is_causal(mask, query.shape[-3] == key.shape[-3]),
        "it has no modifier": bool(request.modifiers),
        "its mask sees no positions": request.positions is not None and mask is not None,
        "it has no dropout": request.dropout_rate > 0,
        "it has no log-sum-exp: return_lse": request.return_lse,
        "it never holds all weights: return_weights": request.return_weights,
        "its values have the width of its keys": not width == key.shape[-1] == value.shape[-1],
        "it needs a query and a key": 0 in (query.size, key.size),
    }
    found = [reason for reason, given in reasons.items() if given]
    return "; ".join(found) or None


def run(request: Request) -> Result:
    """Attention by this kernel."""
    query = request.query
    batch = (x.reshape(-1, *x.shape[-3:]) for x in (query, request.key, request.value))
    output = jax.nn.dot_product_attention(
        *batch,
        scale=_scale(request.score, query.shape[-1]),
        is_causal=request.mask is not None,
        implementation="cudnn",
    )
    return Result(checkpoint_name(output.reshape(query.shape), "attend_output"), None, None)


def _scale(score: Any, width: int) -> float | None:
    """The factor of a scaled dot product; None where the score is another, or its scale traced."""
    options: dict[str, Any] = {}
    if isinstance(score, functools.partial) and not score.args:
        score, options = score.func, score.keywords
    scale = options.get("scale")
    if score is not scores.scaled_dot_product or not set(options) <= {"scale"}:
        return None
    if scale is None:
        return width**-0.5
    return float(scale) if isinstance(scale, (int, float)) else None


def _is_causal(mask: masks.Mask, square: bool) -> bool:
    offset = getattr(mask, "offset", None)
    return (
        square and isinstance(mask, type(masks.causal())) and isinstance(offset, int) and not offset
    )
