"""Attention block by block: online softmax over blocks of keys, memory linear in length, forward and backward.

For one block of queries, blocks of keys are visited one after another:

    m' = max(m, max_s score),  l' = l e^(m − m') + Σ_s e^(score − m'),  o' = o e^(m − m') + Σ_s e^(score − m') value_s

and at the end output = o / l, log-sum-exp = m + log l. The backward pass computes each block's weights again from the
log-sum-exp. Blocks that the mask calls EMPTY are skipped, in FULL ones its rule is not evaluated. No array of T × S
elements exists but those that the caller brings, a dense mask or bias, and the gradient of such a bias. (A bias that is
shared along some of several leading axes and not along others is repeated along them.)

Papers: Rabe & Staats 2021, https://arxiv.org/abs/2112.05682; Dao et al. 2022, https://arxiv.org/abs/2205.14135
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jattn.functional import checks
from jattn.functional.blocks import EMPTY
from jattn.functional.masks import Mask
from jattn.functional.modifiers import Bias, Modifier
from jattn.kernels import arrays, grid
from jattn.kernels.arrays import (
    head_scores,
    heads_first,
    heads_last,
    hide,
    keys_seen,
    pool,
    queries_seen,
    turned,
)
from jattn.kernels.dropout import drop
from jattn.kernels.hoist import hoist, join, split
from jattn.kernels.tiles import Tiles, four_axes

Array = jax.Array


class Operands(NamedTuple):
    """Everything that gradients may flow into."""

    query: Array  # [..., T, N, H]
    key: Array  # [..., S, K, H']
    value: Array  # [..., S, K, V]
    biases: list[Array]  # [B or 1, N or 1, T or 1, S or 1]
    captured: list[list[Any]]  # by score, by modifiers; None in the place of what has no gradient


class Context(NamedTuple):
    """Everything else that may be traced."""

    captured: list[list[Any]]  # by score, by modifiers; None in the place of what is among the operands
    allowed: list[Array]  # captured by the mask's rule
    classes: list[Array]  # captured by the mask's classes
    dropout_key: Array | None


class Program(NamedTuple):
    """The static part: the grid, and functions of a block that are pure in what their callables captured."""

    tiles: Tiles
    score: Callable[..., Array]  # (captured, query, key) -> [..., N, rows, columns]
    modify: Callable[..., Array]  # (captured, scores, cut biases, b, i, j) -> [..., N, rows, columns]
    allowed: Callable[..., Array]  # (captured, b, i, j) -> boolean
    classes: Callable[..., Array] | None  # (captured, b, i) -> [num_columns]; None if all blocks are FULL
    dropout_rate: float


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
    """As `dense.attend`, in linear memory; derivatives are reverse-mode and of first order.

    Raises:
      NotImplementedError: weights are asked for, which a kernel of linear memory cannot have, or arrays are sharded
        explicitly.
    """
    if return_weights:
        raise NotImplementedError("blockwise never has all weights at once: return_weights")
    *lead, T, N, _ = query.shape
    if 0 in (*lead, T, key.shape[-3]):
        empty = jnp.zeros((*lead, T, N, value.shape[-1]), value.dtype)
        return empty, jnp.full((*lead, T, N), -jnp.inf, checks.accumulator(query.dtype)), None
    rows = [query, key, value]
    tiles = grid.choose_tiles(score, query, key, positions)
    program, operands, context = _program(tiles, rows, score, mask, modifiers, dropout_rate, dropout_key)
    if any(_is_manual(array) for array in jax.tree.leaves((operands, context))):
        raise NotImplementedError("blockwise: operands in shard_map, or on a mesh with explicit axes")
    output, lse = _differentiable(program)(operands, context)
    return output, lse, None


def _is_manual(array):
    """Whether the array's type carries mesh axes, with which loops here would have to agree."""
    kind = jax.typeof(array)
    varying = getattr(getattr(kind, "mat", kind), "varying", ()) or getattr(kind, "vma", ())
    return bool(varying) or any(axis is not None for axis in kind.sharding.spec)


def _program(tiles, rows, score, mask, modifiers, dropout_rate, dropout_key):
    """Separate what callables do from what they capture, and what has gradients from what has none."""

    def modify(scores, cuts, b, i, j):
        block, shape, cuts = tiles.block(b, i, j), scores.shape, list(cuts)
        for modifier in modifiers:
            if isinstance(modifier, Bias):
                scores = scores + cuts.pop(0).astype(scores.dtype)
            else:
                scores = modifier.rule(scores.reshape(block.shape), block).reshape(shape)
        return scores

    biases = [four_axes(modifier.array, tiles.lead) for modifier in modifiers if isinstance(modifier, Bias)]
    index, operands = jax.ShapeDtypeStruct((), jnp.int32), grid.block_shapes(tiles, *rows[:2])
    evaluate = functools.partial(head_scores, score)
    pure_score, of_score = hoist(evaluate, *operands)
    cuts = [jax.eval_shape(tiles.cut, bias, index, index, index) for bias in biases]
    pure_modify, of_modifiers = hoist(modify, jax.eval_shape(evaluate, *operands), cuts, index, index, index)
    pure_allowed, of_allowed = hoist(functools.partial(tiles.allowed, mask), index, index, index)
    pure_classes, of_classes = hoist(functools.partial(tiles.classify, mask), index, index)
    moving, fixed = split([of_score, of_modifiers])
    classes = None if mask is None and not tiles.overlap else pure_classes
    tiles = dataclasses.replace(tiles, positions=None)  # hoisted by now: what is kept here is static
    program = Program(tiles, pure_score, pure_modify, pure_allowed, classes, dropout_rate)
    return program, Operands(*rows, biases, moving), Context(fixed, of_allowed, of_classes, dropout_key)


def _differentiable(program: Program) -> Callable[[Operands, Context], tuple[Array, Array]]:
    @jax.custom_vjp
    def run(operands, context):
        output, *lse = _forward(program, operands, context)
        return output, sum(lse)

    def forward(operands, context):
        names = ("attend_output", "attend_lse", "attend_lse")
        output, *lse = map(checkpoint_name, _forward(program, operands, context), names)
        return (output, sum(lse)), (operands, context, output, *lse)

    def backward(residuals, cotangents):
        return _backward(program, *residuals, *cotangents), None

    run.defvjp(forward, backward)
    return run


def _forward(program: Program, operands: Operands, context: Context) -> tuple[Array, Array, Array]:
    """Output, largest score, and logarithm of the sum over it: added up, large scores would swallow the last."""
    one = _one_at_a_time(functools.partial(_forward_rows, program))
    if program.tiles.examples is None:
        return one(jnp.zeros((), jnp.int32), operands, context)

    def part(_, numbered):
        b, *rows = numbered
        return None, one(b, Operands(*rows, *operands[3:]), context)

    _, (output, *lse) = jax.lax.scan(part, None, program.tiles.parts(operands[:3]))
    rows = operands.query.shape[:-1]
    return output.reshape(*rows, output.shape[-1]), *(array.reshape(rows) for array in lse)


def _backward(program, operands, context, output, maximum, log_total, output_cotangent, lse_cotangent):
    tiles = program.tiles
    # d lse reaches a score with its weight, as −delta does: both are summed over a row's weights
    delta = (output.astype(maximum.dtype) * output_cotangent.astype(maximum.dtype)).sum(-1) - lse_cotangent
    empty = jnp.isneginf(log_total)
    delta, log_total = (jnp.where(empty, 0, array) for array in (delta, log_total))
    output_cotangent = jnp.where(empty[..., None], 0, output_cotangent)
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, _sum_dtype(array)), (operands.biases, operands.captured))
    rows = maximum, log_total, delta, output_cotangent
    one = _one_at_a_time(functools.partial(_backward_rows, program))
    if tiles.examples is None:
        rows, shared = one(jnp.zeros((), jnp.int32), operands, context, *rows, zeros)
    else:

        def part(shared, numbered):
            b, query, key, value, *rest = numbered
            rows, shared = one(b, Operands(query, key, value, *operands[3:]), context, *rest, shared)
            return shared, rows

        shared, rows = jax.lax.scan(part, zeros, tiles.parts([*operands[:3], *rows]))
    gradients = Operands(*(g.reshape(x.shape) for g, x in zip(rows, operands[:3], strict=True)), *shared)
    return jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), gradients, operands)


def _sum_dtype(array):
    return checks.accumulator(array.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype


def _one_at_a_time(function):
    """Under vmap, where one CPU device works anyway in turn, keep loops and lengths of each example its own."""
    return jax.custom_batching.sequential_vmap(function) if grid.one_cpu_device() else function


def _forward_rows(program: Program, b: Array, operands: Operands, context: Context) -> tuple[Array, Array, Array]:
    """As `_forward`, for one part of the batch: one row of blocks after another."""
    tiles, value_dtype = program.tiles, operands.value.dtype
    (*lead, T, N, _), V = operands.query.shape, operands.value.shape[-1]
    dtype = checks.accumulator(operands.query.dtype)
    lowest = jnp.finfo(dtype).min  # in place of −inf, which cannot be subtracted from itself

    def row(backwards, results):
        i = tiles.num_rows - 1 - backwards  # where two rows overlap, the earlier one holds all that counts
        start = tiles.row_start(i)
        query = heads_first(arrays.read(operands.query, start, tiles.rows)).astype(dtype)

        def part(j, masked):
            scores, value, _ = _scores(program, operands, context, query, b, i, j, masked)
            maximum = jnp.maximum(scores.max(-1), lowest)
            weights = jnp.exp(scores - maximum[..., None])
            return maximum, weights.sum(-1), pool(_drop(program, context, weights, b, i, j), value)

        def merge(sums, _, part):
            if tiles.num_columns == 1:
                return part
            maximum = jnp.maximum(sums[0], part[0])
            old, new = jnp.exp(sums[0] - maximum), jnp.exp(part[0] - maximum)
            return maximum, sums[1] * old + part[1] * new, sums[2] * old[..., None] + part[2] * new[..., None]

        shape = (*lead, N, tiles.rows)
        nothing = jnp.full(shape, lowest, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, V), dtype)
        maximum, total, output = _over_columns(program, context, b, i, part, merge, nothing, nothing)
        divisor = jnp.maximum(total, 1)  # the largest weight alone is 1, so it is more, or nothing
        output = (output / divisor[..., None]).astype(value_dtype)
        log_total = jnp.where(total == 0, -jnp.inf, jnp.log(divisor))
        parts = map(heads_last, (output, maximum[..., None], log_total[..., None]))
        return tuple(arrays.write(result, part, start) for result, part in zip(results, parts, strict=True))

    results = jnp.zeros((*lead, T, N, V), value_dtype), *[jnp.zeros((*lead, T, N, 1), dtype)] * 2
    output, maximum, log_total = _loop(0, tiles.num_rows, row, results)
    return output, maximum[..., 0], log_total[..., 0]


def _backward_rows(program, b, operands, context, maximum, log_total, delta, output_cotangent, shared):
    """Gradients of query, key and value, and `shared` = those of biases and captured arrays, added to what came in.

    Those of key and value are summed as `[..., width, S]`: XLA's matrix products on CPU are three times as slow where
    they have to sum over the rows of a large left operand.
    """
    tiles, dtype = program.tiles, maximum.dtype

    def row(i, carry):
        start = tiles.row_start(i)
        rows = operands.query, output_cotangent, *(array[..., None] for array in (maximum, log_total, delta))
        query, cotangent, highest, logs, deltas = (
            heads_first(arrays.read(array, start, tiles.rows)).astype(dtype) for array in rows
        )
        columns_first = rearrange(cotangent, "... (K G) T V -> ... K V (G T)", K=operands.value.shape[-2])

        def contribution(j, masked):
            scores, value, pull = _scores(program, operands, context, query, b, i, j, masked)
            weights = jnp.exp((scores - highest) - logs)
            if masked:
                weights = jnp.where(jnp.isneginf(scores), 0, weights)  # also in a row that holds a NaN
            of_weights = _drop(program, context, arrays.outer(cotangent, value), b, i, j)
            of_scores = weights * (of_weights - deltas)
            of_value = arrays.pool_turned(_drop(program, context, weights, b, i, j), columns_first)
            of_query, of_key, *rest = pull(of_scores)
            return of_query, turned(of_key), *rest, of_value

        def fold(carry, j, part):
            query, key, value, (biases, captured) = carry
            of_query, of_key, of_cuts, of_captured, of_value = part
            column = tiles.column_start(j)
            biases = [tiles.add(bias, cut, b, i, j) for bias, cut in zip(biases, of_cuts, strict=True)]
            captured = jax.tree.map(lambda array, part: array + part.astype(array.dtype), captured, of_captured)
            key, value = arrays.add(key, of_key, column, -1), arrays.add(value, of_value, column, -1)
            return query + of_query, key, value, (biases, captured)

        of_query, *rest = carry
        sums = _over_columns(program, context, b, i, contribution, fold, None, (jnp.zeros_like(query), *rest))
        return arrays.add(of_query, heads_last(sums[0]), start), *sums[1:]

    gradients = (
        jnp.zeros(operands.query.shape, dtype),
        *(jnp.zeros((*x.shape[:-3], *x.shape[-2:], x.shape[-3]), dtype) for x in operands[1:3]),
    )
    query, key, value, shared = _loop(0, tiles.num_rows, row, (*gradients, shared))
    return [query, *(rearrange(x, "... K H S -> ... S K H") for x in (key, value))], shared


def _over_columns(program, context, b, i, compute, fold, nothing, sums):
    """Fold `compute(j, masked)` over the blocks of row i into the sums; FULL ones need no mask, EMPTY ones are nothing.

    `nothing` is what an EMPTY block computes; None: zeros.
    """
    columns = program.tiles.num_columns
    if program.classes is None or columns == 1:
        masked = program.classes is not None
        return _loop(0, columns, lambda j, sums: fold(sums, j, compute(j, masked)), sums)
    classes = program.classes(context.classes, b, i)
    seen = classes != EMPTY
    first, last = jnp.argmax(seen), columns - 1 - jnp.argmax(seen[::-1])

    def visit(j, sums):
        # Only a block's own part passes through the branches: what does is copied, and gradients of keys are long
        full, masked = (functools.partial(compute, j, masked) for masked in (False, True))
        part = jax.lax.switch(classes[j], [lambda: _zeros(full) if nothing is None else nothing, masked, full])
        return fold(sums, j, part)

    return _loop(first, jnp.where(seen.any(), last + 1, first), visit, sums)


def _zeros(function):
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function))


def _loop(first, end, body, carry):
    if isinstance(end, int) and end == first + 1:
        return body(jnp.zeros((), jnp.int32), carry)
    first, end = jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)
    return jax.lax.fori_loop(first, end, lambda index, carry: body(index.astype(jnp.int32), carry), carry)


def _scores(program, operands, context, query, b, i, j, masked):
    """Scores of block (i, j), −inf where forbidden, its values, and the function that pulls cotangents back."""
    tiles, dtype = program.tiles, query.dtype
    key, value = (
        heads_first(arrays.read(array, tiles.column_start(j), tiles.columns)).astype(dtype) for array in operands[1:3]
    )
    cuts = [tiles.cut(bias, b, i, j) for bias in operands.biases]
    allowed = program.allowed(context.allowed, b, i, j) if masked else None
    keys = keys_seen(allowed, key.shape[-3])

    def scores(query, key, cuts, moving):
        of_score, of_modifiers = join(moving, context.captured)
        result = program.score(of_score, hide(query, queries_seen(allowed)), hide(key, keys))
        # Forbidden scores become zeros before they are modified, lest a NaN made of them turn up in a gradient
        return program.modify(of_modifiers, hide(result, allowed), cuts, b, i, j)

    result, pull = jax.vjp(scores, query, key, cuts, operands.captured)
    return jnp.where(allowed, result, -jnp.inf) if masked else result, hide(value, keys), pull


def _drop(program, context, weights, b, i, j):
    if program.dropout_rate == 0:
        return weights
    block = program.tiles.block(b, i, j)
    return drop(weights.reshape(block.shape), block, program.dropout_rate, context.dropout_key).reshape(weights.shape)
