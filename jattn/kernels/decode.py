"""A few queries against many keys: the numbers of `dense`, without copies of keys and values.

`dense` replaces hidden keys and values by zeros, for what they hold must not matter: 0 · NaN is
NaN. Where queries are few, as in decoding from a cache, these copies take most of the time. Here
keys and values are read as they are. A hidden NaN or inf shows: then a score, or the output, is not
finite, and the specification runs instead. A conditional is cheap on CPU; other platforms fuse the
zeros into the products, and run the specification at once.

Derivatives are those of the specification.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import compat
from jattn.functional.softmax import softmax_and_logsumexp
from jattn.kernels import dense
from jattn.kernels.arrays import heads_first, heads_last, hide, pool, queries_seen
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
    *found, is_finite = compat.vary_alike(_as_they_are(scoring, operands))
    return jax.lax.cond(
        is_finite,
        lambda operands: tuple(found),
        lambda operands: compat.vary_alike(_specified(scoring, operands), found),
        operands,
    )


def _as_they_are(scoring: Scoring, operands: Operands) -> tuple[Array, Array, Array]:
    """Output and log-sum-exp from keys and values that are not hidden, and whether they are so."""
    at = (operands.first,) * 4
    query, key, value = map(heads_first, operands[:3])
    allowed = scoring.allowed(operands.captured, *at)
    with scoring.at_precision():
        raw = scoring.score(operands.captured, hide(query, queries_seen(allowed)), key)
        scores = scoring.modified(
            operands.captured, hide(raw, allowed), operands.biases, allowed, *at
        )
        weights, lse = softmax_and_logsumexp(scores, allowed)
        output = pool(scoring.dropped(operands.dropout, weights, *at), value)
    is_finite = jnp.isfinite(raw).all() & jnp.isfinite(output).all()
    output, lse = heads_last(output).astype(value.dtype), heads_last(lse[..., None])[..., 0]
    return output, lse, is_finite
