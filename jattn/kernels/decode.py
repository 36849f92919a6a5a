"""A few queries against many keys: the numbers of `dense`, without copies of keys and values.

`dense` replaces hidden keys and values by zeros, for what they hold must not matter: 0 · NaN is
NaN. Where queries are few, as in decoding from a cache, these copies take most of the time. Here
keys and values are read as they are. The scores of hidden keys are replaced, whatever they are. A
hidden value of NaN or inf shows: the sum of values is not finite then, and is taken again, with
zeros. A conditional is cheap on CPU; other platforms fuse the zeros into the products, and run the
specification at once.

Derivatives are those of the specification.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import compat
from jattn.kernels import dense
from jattn.kernels.arrays import heads_first, heads_last, hide, keys_seen, pool
from jattn.kernels.execute import execute
from jattn.kernels.scoring import Operands, Scoring
from jattn.request import Request, Result

Array = jax.Array
Pair = tuple[Array, Array]
# Beyond so many queries a key head, products take longer than copies
FEW_QUERIES = 32
MANY_KEYS = 128


def refuses(request: Request) -> str | None:
    """Why this kernel cannot do what is asked; None if it can."""
    if request.return_weights:
        return 'it gives no weights, for return_weights: "dense" does'
    return dense.refuses(request)


def is_fast(request: Request) -> bool:
    """Whether it takes less time than `dense`: a mask hides keys from few queries."""
    T, N, S, K = (*request.query.shape[-3:-1], *request.key.shape[-3:-1])
    if request.mask is None or request.mesh is not None or request.is_symbolic:
        return False
    return T * (N // K) <= FEW_QUERIES and S >= MANY_KEYS


def run(request: Request) -> Result:
    """Attention by this kernel."""
    return execute(_run, *dense.prepared(request), request)


def _run(scoring: Scoring, operands: Operands) -> Result:
    if not scoring.is_masked:
        return dense.output(scoring, operands)
    return Result(*_attend(scoring, operands), None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(scoring: Scoring, operands: Operands) -> Pair:
    """Output and log-sum-exp."""
    return jax.lax.platform_dependent(
        operands,
        cpu=functools.partial(_on_cpu, scoring),
        default=functools.partial(_specified, scoring),
    )


@_attend.defjvp
def _derivative(scoring: Scoring, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_specified, scoring), primals, tangents)


def _specified(scoring: Scoring, operands: Operands) -> Pair:
    output, lse, _ = dense.output(scoring, operands)
    assert lse is not None  # dense always gives one
    return output, lse


def _on_cpu(scoring: Scoring, operands: Operands) -> Pair:
    at = (operands.first,) * 4
    query, key, value = map(heads_first, operands[:3])
    allowed = scoring.allowed(operands.captured, *at)
    with scoring.at_precision():
        raw = hide(scoring.score(operands.captured, query, key), allowed)
        scores = scoring.modified(operands.captured, raw, operands.biases, allowed, *at)
        scores = jnp.where(allowed, scores, -jnp.inf)
        maximum = scores.max(axis=-1, keepdims=True, initial=-jnp.inf)
        shares = jnp.exp(scores - jnp.where(jnp.isneginf(maximum), 0, maximum))
        total = shares.sum(axis=-1, keepdims=True)
        divisor = jnp.where(total == 0, 1, total)
        weights = scoring.dropped(operands.dropout, shares / divisor, *at)
        output = _pooled(weights, value, allowed)
    lse = jnp.where(total == 0, -jnp.inf, maximum + jnp.log(divisor))
    return heads_last(output).astype(value.dtype), heads_last(lse)[..., 0]


def _pooled(weights: Array, value: Array, allowed: Array) -> Array:
    """Sums of values, of which those that are hidden hold anything and have weights of 0."""

    def with_zeros(weights: Array, value: Array) -> Array:
        seen = keys_seen(allowed, value.shape[-3])

        def column(v: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(value, v, 1, axis=-1)
            return pool(weights, hide(part, seen))[..., 0]

        # One by one: the memory of a branch is taken whether it runs or not
        columns = jax.lax.map(column, jnp.arange(value.shape[-1], dtype=jnp.int32))
        return jnp.moveaxis(columns, 0, -1)

    found = pool(weights, value)
    if value.shape[-1] == 0:
        return found
    # 0 · NaN is NaN; a sum that overflows does no harm
    operands = compat.vary_alike((jnp.isfinite(found.sum()), found, weights, value))
    is_finite, found, weights, value = operands
    return jax.lax.cond(is_finite, lambda *_: found, with_zeros, weights, value)
