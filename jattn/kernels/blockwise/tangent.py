"""The tangent of attention as a sum over blocks; gradients are its transpose, taken by JAX.

Of a query with scores x, weights p = e^(x − lse), values v and output o = Σ p v, the tangents are

    c = p · dx                                   the key's part of d_lse
    d_output = Σ c v + Σ p dv − o Σ c
    d_lse    = Σ c

summed over keys. (With dropout D, D(c) and D(p) multiply v and dv.) No array of size T × S is kept:
each block recomputes its weights from the scores, their maximum and the logarithm of the sum.

The transpose of this sum does the same. With cotangents ō of the output and l̄ of the lse it gives

    v̄ = Σ p ō,    x̄ = p (ō · v − ō · o + l̄)

where v̄ is summed over queries. x̄ passes through the score to the gradients of query, key and
captured arrays. ō · o, a number for each query, is computed once, outside of the loops. The
residuals are the operands and the results of the forward pass. Tangents and transposes of these
sums are such sums again, and so give Hessian-vector products and all higher orders.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jattn.kernels import arrays
from jattn.kernels.arrays import heads_first, heads_last, hide, keys_seen, queries_seen
from jattn.kernels.blockwise.block_specs import BlockSpec, Index
from jattn.kernels.blockwise.forward import CLASSES_SPEC, KEY_SPEC, QUERY_SPEC, bias_spec
from jattn.kernels.blockwise.sums import Sum
from jattn.kernels.scoring import Operands, Scoring

Array = jax.Array
STATISTICS_SPEC = BlockSpec((0,), rows=-2)  # [parts, *batch, T, N]
VALUE = Operands._fields.index("value")


def tangent(
    scoring: Scoring,
    classes: Array | None,
    operands: Operands,
    results: tuple[Array, Array, Array],
    tangents: Operands,
) -> tuple[Array, Array]:
    """Tangents of output and log-sum-exp.

    Args:
      scoring: what was computed.
      classes: of the blocks; None: all alike.
      operands: as in `forward`.
      results: output, maximum and log_total, from there.
      tangents: of the operands; None for a tangent of zero.
    """
    output, maximum, log_total = results
    structure: Any
    given, structure = jax.tree.flatten(operands)
    d_given = structure.flatten_up_to(tangents)
    nonzero = tuple(k for k, d_array in enumerate(d_given) if d_array is not None)
    specs = [
        QUERY_SPEC,
        KEY_SPEC,
        KEY_SPEC,
        *(bias_spec(bias, scoring.grid) for bias in operands.biases),
        *[BlockSpec()] * (structure.num_leaves - 3 - len(operands.biases)),
    ]
    terms = [
        functools.partial(_term, scoring, structure, nonzero, masked) for masked in (True, False)
    ]
    over_blocks = Sum(
        grid=scoring.grid,
        loops=(scoring.grid.num_parts,),
        terms=(terms[0], terms[1]),
        is_masked=scoring.is_masked,
        classes=None if classes is None else CLASSES_SPEC,
        operands=(STATISTICS_SPEC, STATISTICS_SPEC, *specs, *(specs[k] for k in nonzero)),
        results=(QUERY_SPEC, STATISTICS_SPEC),
        shapes=(output.shape, maximum.shape),
        dtypes=(output.dtype, maximum.dtype),
    )
    # In a row without an allowed key log_total is −1, and all weights are 0
    statistics = maximum, hide(log_total, log_total >= 0)
    pooled, d_lse = over_blocks(classes, *statistics, *given, *(d_given[k] for k in nonzero))
    # Its transpose is ō · o, once for each query
    return pooled - output * d_lse[..., None].astype(output.dtype), d_lse


def _term(
    scoring: Scoring,
    structure: Any,
    nonzero: Sequence[int],
    masked: bool,
    at: Index,
    *blocks: Array,
) -> tuple[Array, Array]:
    """A block's terms of Σ c v + Σ p dv, `[*batch, rows, N, V]`, and Σ c, `[*batch, rows, N]`."""
    count = structure.num_leaves
    (maximum, log_total), given = blocks[:2], blocks[2 : 2 + count]
    d_blocks = dict(zip(nonzero, blocks[2 + count :], strict=True))
    operands = Operands(*jax.tree.unflatten(structure, given))
    place = (*at.place, operands.first)
    allowed = scoring.allowed(operands.captured, *place) if masked else None

    def scores_and_value(*inner: Array) -> tuple[Array, Array]:
        leaves = list(given)
        for k, leaf in zip(nonzero, inner, strict=True):
            leaves[k] = leaf
        block = Operands(*jax.tree.unflatten(structure, leaves))
        query, key, value = map(heads_first, block[:3])
        value = hide(value, keys_seen(allowed, value.shape[-3]))
        return scoring.scores(block.captured, query, key, block.biases, allowed, *place), value

    with scoring.at_precision():
        (scores, value), (d_scores, d_value) = jax.jvp(
            scores_and_value, [given[k] for k in nonzero], [d_blocks[k] for k in nonzero]
        )
    maximum, log_total = (heads_first(statistic[..., None]) for statistic in (maximum, log_total))
    exponent = (scores - maximum) - log_total
    if allowed is not None:
        exponent = jnp.where(allowed, exponent, -jnp.inf)
    weights = jnp.exp(exponent)
    dropped = functools.partial(scoring.dropped, operands.dropout)
    shares = weights * d_scores
    d_lse = shares.sum(-1, keepdims=True)
    with scoring.at_precision():
        pooled = arrays.pool(dropped(shares, *place), value)
        if VALUE in nonzero:
            pooled = pooled + arrays.pool(dropped(weights, *place), d_value)
    # A query without an allowed key has zeros already; this stops a NaN cotangent
    pooled = hide(pooled, queries_seen(allowed))
    return heads_last(pooled), heads_last(d_lse)[..., 0]
