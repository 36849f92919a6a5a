"""Attention block by block: online softmax over blocks of keys, memory linear in length, forward and backward.

For one block of queries, blocks of keys are visited one after another:

    m' = max(m, max_s score),  l' = l e^(m − m') + Σ_s e^(score − m'),  o' = o e^(m − m') + Σ_s e^(score − m') value_s

and at the end output = o / l, log-sum-exp = m + log l. The backward pass computes each block's weights again from the
log-sum-exp. Blocks that the mask calls EMPTY are skipped, in FULL ones its rule is not evaluated. No array of T × S
elements exists but those that the caller brings, a dense mask or bias, and the gradient of such a bias.

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
from jattn.kernels import arrays
from jattn.kernels.arrays import head_scores, heads_first, hide, keys_seen, pool, queries_seen, turned
from jattn.kernels.dropout import drop
from jattn.kernels.hoist import hoist, join, split
from jattn.kernels.tiles import Tiles, block_size, four_axes, largest_intermediate

Array = jax.Array

ROWS, COLUMNS = 512, 512  # of a block whose intermediates all fit into BLOCK_BYTES; half as many in short sequences
BLOCK_BYTES = 2**24  # additive scores have an intermediate of rows × columns × width: their blocks are smaller


class Operands(NamedTuple):
    """Everything that gradients may flow into."""

    query: Array  # [..., N, T, H]
    key: Array  # [..., K, S, H']
    value: Array  # [..., K, S, V]
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
    return_weights: bool,
) -> tuple[Array, Array, Array | None]:
    """As `dense.attend`, in linear memory; derivatives are reverse-mode and of first order.

    Raises:
      NotImplementedError: weights are asked for, which a kernel of linear memory cannot have.
    """
    if return_weights:
        raise NotImplementedError("blockwise never has all weights at once: return_weights")
    if any(_is_manual(array) for array in (query, key, value)):
        raise NotImplementedError("blockwise: operands in shard_map, or on a mesh with explicit axes")
    *lead, T, N, _ = query.shape
    if 0 in (*lead, T, key.shape[-3]):
        empty = jnp.zeros((*lead, T, N, value.shape[-1]), value.dtype)
        return empty, jnp.full((*lead, T, N), -jnp.inf, checks.accumulator(query.dtype)), None
    rows = [heads_first(array) for array in (query, key, value)]
    tiles = _tiles(score, rows[0], rows[1], positions)
    program, operands, context = _program(tiles, rows, score, mask, modifiers, dropout_rate, dropout_key)
    output, lse = _differentiable(program)(operands, context)
    return rearrange(output, "... N T V -> ... T N V"), rearrange(lse, "... N T -> ... T N"), None


def _tiles(score, query, key, positions):
    """Choose the grid: blocks as large as their largest intermediate allows."""
    (*lead, N, T, _), S = query.shape, key.shape[-2]
    per_example = bool(lead) and _one_cpu_device() and _takes_one_example(score, query, key)
    tiles = Tiles(tuple(lead), N, T, S, *_sides(T, S), positions, per_example)
    evaluate = functools.partial(head_scores, score)
    while max(tiles.rows, tiles.columns) > 32:
        if largest_intermediate(evaluate, *_block_shapes(tiles, query, key)) <= BLOCK_BYTES:
            break
        if tiles.rows >= tiles.columns:
            tiles = dataclasses.replace(tiles, rows=block_size(T, tiles.rows // 2))
        else:
            tiles = dataclasses.replace(tiles, columns=block_size(S, tiles.columns // 2))
    return tiles


def _takes_one_example(score, query, key):
    """Whether the score can do without batch axes; it cannot if it captures an array that has them."""
    try:
        one = (jax.ShapeDtypeStruct(rows.shape[-3:], rows.dtype) for rows in (query, key))
        jax.eval_shape(functools.partial(head_scores, score), *one)
    except (TypeError, ValueError):
        return False
    return True


def _is_manual(array):
    """Whether the array's type carries mesh axes, with which loops here would have to agree."""
    kind = jax.typeof(array)
    return bool(getattr(kind, "vma", ())) or any(axis is not None for axis in kind.sharding.spec)


def _sides(T, S):
    """Rows and columns of a block: with fewer than four of them to an axis, too little of a mask is EMPTY or FULL."""
    sides = ((T, ROWS), (S, COLUMNS))
    return tuple(block_size(length, side if length > 4 * side else max(side // 2, 1)) for length, side in sides)


def _block_shapes(tiles, query, key):
    lead, dtype = query.shape[:-3][: 0 if tiles.per_example else None], checks.accumulator(query.dtype)
    lengths = zip((query, key), (tiles.rows, tiles.columns), strict=True)
    return [jax.ShapeDtypeStruct((*lead, x.shape[-3], length, x.shape[-1]), dtype) for x, length in lengths]


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
    index, operands = jax.ShapeDtypeStruct((), jnp.int32), _block_shapes(tiles, *rows[:2])
    evaluate = functools.partial(head_scores, score)
    pure_score, of_score = hoist(evaluate, *operands)
    cuts = [jax.eval_shape(tiles.cut, bias, index, index, index) for bias in biases]
    pure_modify, of_modifiers = hoist(modify, jax.eval_shape(evaluate, *operands), cuts, index, index, index)
    pure_allowed, of_allowed = hoist(functools.partial(tiles.allowed, mask), index, index, index)
    pure_classes, of_classes = hoist(functools.partial(tiles.classify, mask), index, index)
    moving, fixed = split([of_score, of_modifiers])
    classes = None if mask is None and not tiles.overlap else pure_classes
    program = Program(tiles, pure_score, pure_modify, pure_allowed, classes, dropout_rate)
    return program, Operands(*rows, biases, moving), Context(fixed, of_allowed, of_classes, dropout_key)


def _one_cpu_device() -> bool:
    """Where examples run one after another, each pays for its own length; elsewhere they share a block."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _differentiable(program: Program) -> Callable[[Operands, Context], tuple[Array, Array]]:
    @jax.custom_vjp
    def run(operands, context):
        return _forward(program, operands, context)

    def forward(operands, context):
        output, lse = _forward(program, operands, context)
        output, lse = checkpoint_name(output, "attend_output"), checkpoint_name(lse, "attend_lse")
        return (output, lse), (operands, context, output, lse)

    def backward(residuals, cotangents):
        return _backward(program, *residuals, *cotangents), None

    run.defvjp(forward, backward)
    return run


def _forward(program: Program, operands: Operands, context: Context) -> tuple[Array, Array]:
    tiles = program.tiles
    one = _one_at_a_time(functools.partial(_forward_rows, program))
    if not tiles.per_example:
        return one(jnp.zeros((), jnp.int32), operands, context)
    rows = [array.reshape(-1, *array.shape[-3:]) for array in operands[:3]]

    def example(numbered):
        b, *rows = numbered
        return one(b, Operands(*rows, *operands[3:]), context)

    output, lse = jax.lax.map(example, (jnp.arange(rows[0].shape[0], dtype=jnp.int32), *rows))
    return output.reshape(*tiles.lead, *output.shape[1:]), lse.reshape(*tiles.lead, *lse.shape[1:])


def _backward(program, operands, context, output, lse, output_cotangent, lse_cotangent):
    tiles = program.tiles
    # d lse reaches a score with its weight, as −delta does: both are summed over a row's weights
    delta = (output.astype(lse.dtype) * output_cotangent.astype(lse.dtype)).sum(-1) - lse_cotangent
    empty = jnp.isneginf(lse)
    delta, lse = (jnp.where(empty, 0, array) for array in (delta, lse))
    output_cotangent = jnp.where(empty[..., None], 0, output_cotangent)
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, _sum_dtype(array)), (operands.biases, operands.captured))
    one = _one_at_a_time(functools.partial(_backward_rows, program))
    if not tiles.per_example:
        first = jnp.zeros((), jnp.int32)
        rows, shared = one(first, operands, context, lse, delta, output_cotangent, zeros)
    else:
        batched = [*operands[:3], lse, delta, output_cotangent]
        flat = [array.reshape(-1, *array.shape[len(tiles.lead) :]) for array in batched]

        def example(shared, numbered):
            b, query, key, value, *rest = numbered
            rows, shared = one(b, Operands(query, key, value, *operands[3:]), context, *rest, shared)
            return shared, rows

        shared, rows = jax.lax.scan(example, zeros, (jnp.arange(flat[0].shape[0], dtype=jnp.int32), *flat))
    gradients = Operands(*(g.reshape(x.shape) for g, x in zip(rows, operands[:3], strict=True)), *shared)
    return jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), gradients, operands)


def _sum_dtype(array):
    return checks.accumulator(array.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype


def _one_at_a_time(function):
    """Under vmap, where one CPU device works anyway in turn, keep loops and lengths of each example its own."""
    return jax.custom_batching.sequential_vmap(function) if _one_cpu_device() else function


def _forward_rows(program: Program, b: Array, operands: Operands, context: Context) -> tuple[Array, Array]:
    """Output `[..., N, T, V]` and log-sum-exp `[..., N, T]`, one row of blocks after another."""
    tiles, value_dtype = program.tiles, operands.value.dtype
    lead, V = operands.query.shape[:-2], operands.value.shape[-1]
    dtype = checks.accumulator(operands.query.dtype)

    def row(backwards, results):
        i = tiles.num_rows - 1 - backwards  # where two rows overlap, the earlier one holds all that counts

        def step(carry, j, masked):
            maximum, total, output = carry
            scores, allowed, _ = _scores(program, operands, context, b, i, j, masked)
            if masked:
                scores = jnp.where(allowed, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            finite = jnp.where(jnp.isneginf(new_maximum), 0, new_maximum)
            weights, shrink = jnp.exp(scores - finite[..., None]), jnp.exp(maximum - finite)
            total = total * shrink + weights.sum(-1)
            value = _value(program, operands, allowed, j)
            output = output * shrink[..., None] + pool(_drop(program, context, weights, b, i, j), value)
            return new_maximum, total, output

        shape = (*lead, tiles.rows)
        initial = jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, V), dtype)
        choose = functools.partial(_choose, program, context, b, i)
        maximum, total, output = choose(step, lambda carry, shapes: carry, lambda carry, j, stepped: stepped, initial)
        divisor = jnp.where(total == 0, 1, total)
        output = (output / divisor[..., None]).astype(value_dtype)
        lse = jnp.where(total == 0, -jnp.inf, maximum + jnp.log(divisor))
        start = tiles.row_start(i)
        return arrays.write(results[0], output, start, -2), arrays.write(results[1], lse, start, -1)

    results = jnp.zeros((*lead, tiles.T, V), value_dtype), jnp.zeros((*lead, tiles.T), dtype)
    return _loop(0, tiles.num_rows, row, results)


def _backward_rows(program, b, operands, context, lse, delta, output_cotangent, shared):
    """Gradients of query, key and value, and `shared` = those of biases and captured arrays, added to what came in.

    Those of key and value are summed as `[..., width, S]`: XLA's matrix products on CPU are three times as slow where
    they have to sum over the rows of a large left operand.
    """
    tiles, dtype = program.tiles, lse.dtype
    gradients = [
        jnp.zeros(array.shape, dtype) for array in (operands.query, turned(operands.key), turned(operands.value))
    ]

    def row(i, carry):
        start = tiles.row_start(i)
        lse_rows, delta_rows = (arrays.read(array, start, tiles.rows, -1)[..., None] for array in (lse, delta))
        cotangent = arrays.read(output_cotangent, start, tiles.rows, -2).astype(dtype)

        def contribution(carry, j, masked):
            scores, allowed, pull = _scores(program, operands, context, b, i, j, masked)
            if masked:
                scores = jnp.where(allowed, scores, -jnp.inf)
            weights = jnp.exp(scores - lse_rows)
            value = _value(program, operands, allowed, j)
            of_weights = _drop(program, context, arrays.outer(cotangent, value), b, i, j)
            of_scores = weights * (of_weights - delta_rows)
            of_value = arrays.pool_transposed(_drop(program, context, weights, b, i, j), cotangent, value.shape[-3])
            return *pull(of_scores), of_value

        def fold(carry, j, part):
            query, key, value, (biases, captured) = carry
            of_query, of_key, of_cuts, of_captured, of_value = part  # of_value is turned already
            column = tiles.column_start(j)
            biases = [tiles.add(bias, cut, b, i, j) for bias, cut in zip(biases, of_cuts, strict=True)]
            captured = jax.tree.map(lambda array, part: array + part.astype(array.dtype), captured, of_captured)
            key, value = arrays.add(key, turned(of_key), column, -1), arrays.add(value, of_value, column, -1)
            return query + of_query, key, value, (biases, captured)

        query, key, value, shared = carry
        of_row = jnp.zeros((*query.shape[:-2], tiles.rows, query.shape[-1]), dtype)
        choose = functools.partial(_choose, program, context, b, i)
        of_row, key, value, shared = choose(contribution, _zeros, fold, (of_row, key, value, shared))
        return arrays.add(query, of_row, start, -2), key, value, shared

    query, key, value, shared = _loop(0, tiles.num_rows, row, (*gradients, shared))
    return [query, turned(key), turned(value)], shared


def _choose(program, context, b, i, compute, nothing, fold, carry):
    """Fold `compute(carry, j, masked)` over the blocks of row i; FULL ones need no mask, EMPTY ones are `nothing`."""
    columns = program.tiles.num_columns
    if program.classes is None:
        return _loop(0, columns, lambda j, carry: fold(carry, j, compute(carry, j, False)), carry)
    classes = program.classes(context.classes, b, i)
    seen = classes != EMPTY
    first, last = jnp.argmax(seen), columns - 1 - jnp.argmax(seen[::-1])

    def visit(j, carry):
        # Only a block's own part passes through the branches: what does is copied, and gradients of keys are long
        full, masked = (functools.partial(compute, carry, j, masked) for masked in (False, True))
        empty = functools.partial(nothing, carry, jax.eval_shape(full))
        return fold(carry, j, jax.lax.switch(classes[j], [empty, masked, full]))

    return _loop(first, jnp.where(seen.any(), last + 1, first), visit, carry)


def _zeros(carry, shapes):
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _loop(first, end, body, carry):
    first, end = jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)
    return jax.lax.fori_loop(first, end, lambda index, carry: body(index.astype(jnp.int32), carry), carry)


def _scores(program, operands, context, b, i, j, masked):
    """Scores of block (i, j), the entries that count or None, and the function that pulls cotangents back."""
    tiles, dtype = program.tiles, checks.accumulator(operands.query.dtype)
    query = arrays.read(operands.query, tiles.row_start(i), tiles.rows, -2).astype(dtype)
    key = arrays.read(operands.key, tiles.column_start(j), tiles.columns, -2).astype(dtype)
    cuts = [tiles.cut(bias, b, i, j) for bias in operands.biases]
    allowed = program.allowed(context.allowed, b, i, j) if masked else None

    def scores(query, key, cuts, moving):
        of_score, of_modifiers = join(moving, context.captured)
        query, key = hide(query, queries_seen(allowed)), hide(key, keys_seen(allowed, key.shape[-3]))
        result = program.score(of_score, query, key)
        # Forbidden scores become zeros before they are modified, lest a NaN made of them turn up in a gradient
        return program.modify(of_modifiers, hide(result, allowed), cuts, b, i, j)

    result, pull = jax.vjp(scores, query, key, cuts, operands.captured)
    return result, allowed, pull


def _value(program, operands, allowed, j):
    value = arrays.read(operands.value, program.tiles.column_start(j), program.tiles.columns, -2)
    value = value.astype(checks.accumulator(value.dtype))
    return hide(value, keys_seen(allowed, value.shape[-3]))


def _drop(program, context, weights, b, i, j):
    if program.dropout_rate == 0:
        return weights
    block = program.tiles.block(b, i, j)
    return drop(weights.reshape(block.shape), block, program.dropout_rate, context.dropout_key).reshape(weights.shape)
