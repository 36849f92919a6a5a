"""A sum over blocks, and its derivatives of every kind: sums over blocks again.

    result[part of block] += term(parts of the operands that the block reads)

A term is a function of a block, nonlinear in some operands and perhaps linear in others. Then

    the tangent of a sum is the sum of the terms' tangents        (forward mode)
    the transpose of a sum that is linear in operands is the sum of the terms' transposes, each
    added where the term had read                                  (reverse mode)
    a batch of sums is a sum over one more axis                    (vmap)

so that nothing is kept between blocks: each block recomputes what it needs, and memory is that of
operands and results. To JAX a sum is one operation. JAX never differentiates its loops, so their
bounds may depend on data: a row of blocks visits only the columns that its mask allows.

Every block reads captured arrays as a whole, and adds to their gradients as a whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import compat, dtypes
from jattn.functional.block import EMPTY, PARTIAL
from jattn.kernels.blockwise import sizes
from jattn.kernels.blockwise.block_specs import BlockSpec, Index, add, block_shape, read
from jattn.kernels.grid import Grid

Array = jax.Array
Term = Callable[..., Sequence[Array]]


@dataclasses.dataclass(frozen=True)
class Sum:
    """The static part of a sum.

    Attributes:
      grid: the blocks.
      loops: the length of each loop around the grid: parts of the batch, then axes of `vmap`.
      terms: `(at, *blocks) -> parts of the results`, of a PARTIAL block and of a FULL one.
      is_masked: whether an entry may be forbidden.
      classes: how the classes of blocks, `[parts, num_rows, num_columns]`, are divided;
        None: all are PARTIAL if masked, else FULL.
      operands: how each operand is divided into blocks.
      results: how each result is divided into blocks.
      shapes: shape of each result.
      dtypes: dtype of each result.
    """

    grid: Grid
    loops: tuple[int, ...]
    terms: tuple[Term, ...]
    is_masked: bool
    classes: BlockSpec | None
    operands: tuple[BlockSpec, ...]
    results: tuple[BlockSpec, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    def __call__(self, classes: Array | None, *operands: Array) -> list[Array]:
        """The results of the sum over these operands."""
        first = [] if classes is None else [classes]
        return _sum(*first, *operands, sum=self)


def _run(*arrays: Array, sum: Sum) -> list[Array]:
    classes, operands = _split(sum, arrays)
    operands = tuple(compat.vary_alike(list(operands), classes))
    shapes = zip(sum.shapes, sum.dtypes, strict=True)
    totals = compat.vary_alike([jnp.zeros(*shape) for shape in shapes], (classes, operands))

    if 0 in sum.loops:
        return totals

    def over_parts(flat: Array, totals: list[Array]) -> list[Array]:
        parts = tuple(jnp.unravel_index(flat, sum.loops))
        return loop(0, sum.grid.num_rows, functools.partial(over_rows, parts), totals)

    def over_rows(parts: tuple[Array, ...], i: Array, totals: list[Array]) -> list[Array]:
        at = Index(parts, i, jnp.zeros((), jnp.int32))
        classes_of_row = None
        if sum.classes is not None and classes is not None:
            classes_of_row = read(classes, sum.classes, sum.grid, at)[i]
        return _row(sum, operands, classes_of_row, at, totals)

    return loop(0, math.prod(sum.loops), over_parts, totals)


def _split(sum: Sum, arrays: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Classes, or None, and operands."""
    return (None, arrays) if sum.classes is None else (arrays[0], arrays[1:])


def _row(
    sum: Sum, operands: Sequence[Array], classes: Array | None, at: Index, totals: list[Array]
) -> list[Array]:
    """Add a row of blocks. Results per query are summed in a carry of their own, and added once."""
    grid = sum.grid
    of_row = [spec.rows is not None and spec.columns is None for spec in sum.results]
    specs = list(zip(sum.operands, operands, strict=True))
    per_row = [
        None if spec.columns is not None else read(operand, spec, grid, at)
        for spec, operand in specs
    ]

    def term(masked: bool, at: Index) -> list[Array]:
        blocks = [
            read(operand, spec, grid, at) if block is None else block
            for block, (spec, operand) in zip(per_row, specs, strict=True)
        ]
        parts = sum.terms[0 if masked else 1](at, *blocks)
        return [part.astype(dtype) for part, dtype in zip(parts, sum.dtypes, strict=True)]

    def fold(at: Index, sums: list[Array], parts: list[Array]) -> list[Array]:
        return [
            total + part if row else add(total, part, spec, grid, at)
            for total, part, spec, row in zip(sums, parts, sum.results, of_row, strict=True)
        ]

    nothing = [
        jnp.zeros_like(read(total, spec, grid, at))
        for total, spec in zip(totals, sum.results, strict=True)
    ]
    zeros = [n if row else t for n, t, row in zip(nothing, totals, of_row, strict=True)]
    sums = over_columns(grid, sum.is_masked, classes, at, term, fold, nothing, zeros)
    return [
        add(total, part, spec, grid, at) if row else part
        for total, part, spec, row in zip(totals, sums, sum.results, of_row, strict=True)
    ]


def over_columns(
    grid: Grid,
    masked: bool,
    classes: Array | None,
    at: Index,
    term: Callable[[bool, Index], Any],
    fold: Callable[[Index, Any, Any], Any],
    nothing: Any,
    sums: Any,
) -> Any:
    """Fold the terms of a row's blocks into sums.

    Where there are several columns, EMPTY blocks are skipped and FULL ones need no mask.

    Args:
      grid: the blocks.
      masked: whether an entry may be forbidden.
      classes: of the blocks in this row, `[num_columns]`; None: all PARTIAL if masked, else FULL.
      at: the row.
      term: `(masked, at) -> parts`.
      fold: `(at, sums, parts) -> sums`.
      nothing: the parts of an EMPTY block.
      sums: what to fold into.
    """
    columns = grid.num_columns
    if classes is None or columns == 1:

        def each(j: Array, sums: Any) -> Any:
            return fold(at._replace(j=j), sums, term(masked, at._replace(j=j)))

        return loop(0, columns, each, sums)
    seen = classes != EMPTY
    first, last = jnp.argmax(seen), columns - 1 - jnp.argmax(seen[::-1])

    def visit(j: Array, sums: Any) -> Any:
        here = at._replace(j=j)
        # A branch returns a block's own part, not the sums: XLA would copy them
        full, partial = (functools.partial(term, is_masked, here) for is_masked in (False, True))
        branch = classes[j].astype(jnp.int32)
        return fold(here, sums, jax.lax.switch(branch, [lambda: nothing, partial, full]))

    return loop(first, jnp.where(seen.any(), last + 1, first), visit, sums)


def loop(first: Any, end: Any, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """`fori_loop` with int32 indices; one pass needs no loop."""
    if isinstance(end, int) and end == first + 1:
        return body(jnp.asarray(first, jnp.int32), carry)
    first, end = jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)
    return jax.lax.fori_loop(
        first, end, lambda index, carry: body(jnp.asarray(index, jnp.int32), carry), carry
    )


def _shapes(*avals: Any, sum: Sum) -> list[Any]:
    shapes = zip(sum.shapes, sum.dtypes, strict=True)
    return [compat.aval_like(avals[-1], shape, dtype) for shape, dtype in shapes]


# Forward mode


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, sum: Sum) -> Any:
    """d Σ term(x) = Σ d term(x, dx): operands first, then tangents that are not zero."""
    start = 0 if sum.classes is None else 1
    nonzero = tuple(
        k - start for k, tangent in enumerate(tangents) if k >= start and tangent is not None
    )
    results = _sum(*primals, sum=sum)
    if not nonzero:
        return results, [None] * len(results)
    tangent = dataclasses.replace(
        sum,
        terms=tuple(functools.partial(_tangent_of_term, term, nonzero) for term in sum.terms),
        operands=(*sum.operands, *(sum.operands[k] for k in nonzero)),
    )
    return results, _sum(*primals, *(tangents[start + k] for k in nonzero), sum=tangent)


def _tangent_of_term(term: Term, nonzero: tuple[int, ...], at: Index, *blocks: Array) -> Any:
    """d term(x, dx) of a block; the last blocks are tangents of the operands `nonzero`."""
    primals, tangents = blocks[: -len(nonzero)], blocks[-len(nonzero) :]

    def of_nonzero(*inner: Array) -> Any:
        given = list(primals)
        for k, block in zip(nonzero, inner, strict=True):
            given[k] = block
        return term(at, *given)

    return jax.jvp(of_nonzero, [primals[k] for k in nonzero], list(tangents))[1]


# Reverse mode


def _transpose(
    cotangents: Sequence[Any], *arrays: Any, avals: Sequence[Any], sum: Sum
) -> Sequence[Any]:
    """(Σ term)ᵀ = Σ termᵀ: residuals first, then cotangents, divided as the results were.

    The transposed term adds to the part of an operand that the term reads. For the tangent of
    attention, this is the backward pass.
    """
    start = 0 if sum.classes is None else 1
    operands = arrays[start:]
    places = [k for k, operand in enumerate(operands) if operand is None]
    linear = {
        k: (block_shape(aval.shape, sum.operands[k], sum.grid), aval.dtype)
        for k, aval in zip(places, avals, strict=True)
    }
    residuals = tuple(k for k, operand in enumerate(operands) if operand is not None)
    wanted = tuple(
        (k, sum.dtypes[k]) for k, cotangent in enumerate(cotangents) if cotangent is not None
    )
    if not wanted:
        return [None] * len(linear)
    transposed = dataclasses.replace(
        sum,
        terms=tuple(
            functools.partial(_transpose_of_term, term, residuals, tuple(linear.items()), wanted)
            for term in sum.terms
        ),
        operands=(*(sum.operands[k] for k in residuals), *(sum.results[k] for k, _ in wanted)),
        results=tuple(sum.operands[k] for k in linear),
        shapes=tuple(aval.shape for aval in avals),
        dtypes=tuple(dtypes.accumulator(aval.dtype) for aval in avals),
    )
    given = (
        *arrays[:start],
        *(operands[k] for k in residuals),
        *(cotangents[k] for k, _ in wanted),
    )
    results = _sum(*given, sum=transposed)
    return [result.astype(aval.dtype) for result, aval in zip(results, avals, strict=True)]


def _transpose_of_term(
    term: Term,
    residuals: tuple[int, ...],
    linear: tuple[tuple[int, tuple[tuple[int, ...], Any]], ...],
    wanted: tuple[tuple[int, Any], ...],
    at: Index,
    *blocks: Array,
) -> Any:
    """termᵀ of a block: cotangents of its linear operands from those of the wanted results."""
    given, cotangents = blocks[: len(residuals)], blocks[len(residuals) :]

    def of_linear(*inner: Array) -> list[Array]:
        places = (*residuals, *(k for k, _ in linear))
        merged = dict(zip(places, (*given, *inner), strict=True))
        results = term(at, *(merged[k] for k in range(len(places))))
        return [results[k].astype(dtype) for k, dtype in wanted]

    zeros = compat.vary_alike([jnp.zeros(*shape) for _, shape in linear], blocks)
    return jax.linear_transpose(of_linear, *zeros)(list(cotangents))


# Batches


def _batch(arrays: Sequence[Array], axes: Sequence[int | None], *, sum: Sum) -> Any:
    arrays = compat.vary_alike(list(arrays))
    (size,) = {x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None}
    batch = _one_by_one if sizes.one_cpu_device() else _all_at_once
    return batch(size, arrays, axes, sum)


def _one_by_one(size: int, arrays: Any, axes: Any, sum: Sum) -> Any:
    """Add a loop around the grid, so that each example skips the EMPTY blocks of its own mask."""
    number = len(sum.loops)

    def looped(spec: BlockSpec, axis: int | None = 0) -> BlockSpec:
        return spec if axis is None else spec._replace(loops=(number, *spec.loops))

    arrays = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(arrays, axes, strict=True)]
    start = 0 if sum.classes is None else 1
    batched = dataclasses.replace(
        sum,
        loops=(*sum.loops, size),
        classes=None if sum.classes is None else looped(sum.classes, axes[0]),
        operands=tuple(map(looped, sum.operands, axes[start:])),
        results=tuple(map(looped, sum.results)),
        shapes=tuple((size, *shape) for shape in sum.shapes),
    )
    return _sum(*arrays, sum=batched), [0] * len(sum.results)


def _all_at_once(size: int, arrays: Any, axes: Any, sum: Sum) -> Any:
    """Add an axis to each block. A block is EMPTY or FULL if it is so for all examples."""
    start = 0 if sum.classes is None else 1
    specs = sum.operands if sum.classes is None else (sum.classes, *sum.operands)
    arrays = [
        x if axis is None else jnp.moveaxis(x, axis, len(spec.loops))
        for x, axis, spec in zip(arrays, axes, specs, strict=True)
    ]
    if sum.classes is not None and axes[0] is not None:
        classes, axis = arrays[0], len(sum.classes.loops)
        same = (classes == jnp.take(classes, jnp.array([0]), axis)).all(axis)
        one_of_them = classes.max(axis)
        arrays[0] = jnp.where(same, one_of_them, jnp.asarray(PARTIAL, classes.dtype))
    mapped = tuple(None if axis is None else 0 for axis in axes[start:])
    places = [len(spec.loops) for spec in sum.results]
    batched = dataclasses.replace(
        sum,
        terms=tuple(functools.partial(_batched_term, term, mapped) for term in sum.terms),
        shapes=tuple(
            (*shape[:place], size, *shape[place:])
            for shape, place in zip(sum.shapes, places, strict=True)
        ),
    )
    return _sum(*arrays, sum=batched), places


def _batched_term(term: Term, mapped: tuple[int | None, ...], at: Index, *blocks: Array) -> Any:
    return jax.vmap(functools.partial(term, at), mapped)(*blocks)


_sum = compat.primitive("sum_over_blocks", _run, _shapes, _jvp, _transpose, _batch)
