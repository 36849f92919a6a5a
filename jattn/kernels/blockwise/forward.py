"""The forward pass: online softmax over blocks of keys."""

import functools

import jax
import jax.numpy as jnp

from jattn.functional import compat, dtypes
from jattn.kernels import arrays
from jattn.kernels.arrays import heads_first, heads_last, hide, keys_seen
from jattn.kernels.blockwise import sizes
from jattn.kernels.blockwise.block_specs import BlockSpec, Index, read
from jattn.kernels.blockwise.sums import loop, over_columns
from jattn.kernels.grid import Grid
from jattn.kernels.scoring import Operands, Scoring

Array = jax.Array
Statistics = tuple[Array, Array, Array]  # of a row's weights: maximum, total, pooled values
# How the grid divides queries [parts, *batch, T, N, H], keys and values [parts, *batch, S, K, H],
# and classes of blocks [parts, num_rows, num_columns]
QUERY_SPEC, KEY_SPEC, CLASSES_SPEC = (
    BlockSpec((0,), rows=-3),
    BlockSpec((0,), columns=-3),
    BlockSpec((0,)),
)


def forward(
    scoring: Scoring, classes: Array | None, operands: Operands
) -> tuple[Array, Array, Array]:
    """Output, largest score and logarithm of the sum over it, for every query.

    The log-sum-exp is their sum. They are two results, because a sum with a large score rounds the
    logarithm away.

    Args:
      scoring: what to compute.
      classes: of the blocks, `[parts, num_rows, num_columns]`; None: all alike.
      operands: query, key and value as `[parts, *batch, length, heads, width]`.

    Returns:
      `[parts, *batch, T, N, V]`, `[parts, *batch, T, N]` and the same, in the dtype in which sums
      are kept. The logarithm is at least 0, since the largest weight is 1; for a query without an
      allowed key it is −1.
    """
    run = functools.partial(_forward, scoring)
    # On one CPU device vmap becomes a loop, so that each example skips its own EMPTY blocks
    if sizes.one_cpu_device():
        run = jax.custom_batching.sequential_vmap(run)
    return run(classes, operands)


def _forward(
    scoring: Scoring, classes: Array | None, operands: Operands
) -> tuple[Array, Array, Array]:
    grid, shape = scoring.grid, operands.query.shape[:-1]
    dtype = dtypes.accumulator(operands.value.dtype)
    of_scores = scoring.score.jaxpr.out_avals[0].dtype
    shapes = ((*shape, operands.value.shape[-1]), dtype), *[((*shape, 1), of_scores)] * 2
    results = compat.vary_alike([jnp.zeros(*each) for each in shapes], (classes, operands))

    def part(b: Array, results: list[Array]) -> list[Array]:
        return loop(0, grid.num_rows, functools.partial(row, b), results)

    def row(b: Array, backwards: Array, results: list[Array]) -> list[Array]:
        # From last to first: where two rows of blocks overlap, the earlier one overwrites the later
        at = Index((b,), grid.num_rows - 1 - backwards, jnp.zeros((), jnp.int32))
        found = _row(scoring, classes, operands, at)
        return [
            _write(result, heads_last(part), at, scoring)
            for result, part in zip(results, found, strict=True)
        ]

    output, maximum, log_total = loop(0, grid.num_parts, part, results)
    return output, maximum[..., 0], log_total[..., 0]


def _row(
    scoring: Scoring, classes: Array | None, operands: Operands, at: Index
) -> tuple[Array, Array, Array]:
    """One row of blocks: `[*batch, N, rows, V]` and twice `[*batch, N, rows, 1]`.

    For one block of queries, blocks of keys are visited one after another:

        m' = max(m, max_s x_s)
        l' = l e^(m − m') + Σ_s e^(x_s − m')
        o' = o e^(m − m') + Σ_s e^(x_s − m') value_s        and at the end, output = o / l

    Dropout drops terms of o, not of l.
    """
    grid, of_scores = scoring.grid, scoring.score.jaxpr.out_avals[0].dtype
    lowest = jnp.finfo(of_scores).min  # not −inf: −inf − (−inf) is NaN
    query = heads_first(read(operands.query, QUERY_SPEC, grid, at))
    step = _step_of_values(operands.value, grid.S)

    def term(masked: bool, at: Index) -> Statistics:
        scores, allowed = scores_of_block(scoring, operands, query, masked, at)
        value = heads_first(read(operands.value, KEY_SPEC, grid, at))
        value = hide(value, keys_seen(allowed, value.shape[-3])) * step
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        # No axes of size 1 here: XLA's CPU fuses a softmax only where it knows the pattern
        maximum = jnp.maximum(scores.max(-1), lowest)
        weights = jnp.exp(scores - maximum[..., None])
        total = weights.sum(-1)
        weights = scoring.dropped(operands.dropout, weights, *at.place, operands.first)
        return maximum, total, arrays.pool(weights, value)

    shape, V = query.shape[:-1], operands.value.shape[-1]
    nothing = (
        jnp.full(shape, lowest, of_scores),
        jnp.zeros(shape, of_scores),
        jnp.zeros((*shape, V), dtypes.accumulator(operands.value.dtype)),
    )
    nothing = compat.vary_alike(nothing, (classes, operands))
    of_row = None if classes is None else read(classes, CLASSES_SPEC, grid, at)[at.i]
    maximum, total, output = over_columns(
        grid, scoring.is_masked, of_row, at, term, _merge, nothing, nothing
    )
    divisor = jnp.maximum(total, 1)  # a total is 0 or at least 1, the largest weight
    log_total = jnp.where(total == 0, -1, jnp.log(divisor))
    output = output / divisor[..., None].astype(output.dtype) / step.astype(output.dtype)
    return output, maximum[..., None], log_total[..., None]


def _merge(_: Index, sums: Statistics, parts: Statistics) -> Statistics:
    """Add the sums over two sets of keys, both relative to the larger maximum."""
    maximum = jnp.maximum(sums[0], parts[0])
    old, new = jnp.exp(sums[0] - maximum), jnp.exp(parts[0] - maximum)
    total = sums[1] * old + parts[1] * new
    old, new = (factor[..., None].astype(sums[2].dtype) for factor in (old, new))
    return maximum, total, sums[2] * old + parts[2] * new


def scores_of_block(
    scoring: Scoring, operands: Operands, query: Array, masked: bool, at: Index
) -> tuple[Array, Array | None]:
    """Scores of a block, and which of its entries are allowed; None: all."""
    grid, place = scoring.grid, (*at.place, operands.first)
    key = heads_first(read(operands.key, KEY_SPEC, grid, at))
    biases = [read(bias, bias_spec(bias, grid), grid, at) for bias in operands.biases]
    allowed = scoring.allowed(operands.captured, *place) if masked else None
    return scoring.scores(operands.captured, query, key, biases, allowed, *place), allowed


def bias_spec(bias: Array, grid: Grid) -> BlockSpec:
    """How the grid divides `[parts, *batch, N or 1, T or 1, S or 1]`, or this without `parts`."""
    rows, columns = (axis if bias.shape[axis] > 1 else None for axis in (-2, -1))
    return BlockSpec((0,) if bias.ndim > len(grid.block_batch) + 3 else (), rows, columns)


def _step_of_values(value: Array, S: int) -> Array:
    """A power of two by which values are multiplied, so that no sum of them overflows.

    The weights of a row sum to at most S before they are divided by their sum. (Values below S
    times the smallest normal number lose digits.)
    """
    wide = jnp.finfo(dtypes.accumulator(value.dtype))
    if float(jnp.finfo(value.dtype).max) <= float(wide.max) / max(S, 1):
        return jnp.ones((), value.dtype)
    return jnp.asarray(2.0 ** -(max(S, 1) - 1).bit_length(), value.dtype)


def _write(array: Array, part: Array, at: Index, scoring: Scoring) -> Array:
    """The array with a row of blocks written into it."""
    start = [jnp.zeros((), jnp.int32)] * array.ndim
    start[0], start[-3] = at.parts[0], jnp.asarray(scoring.grid.row_start(at.i), jnp.int32)
    return jax.lax.dynamic_update_slice(array, part[None], start)
