"""The size of blocks: as large as the cache and a limit on intermediate arrays allow."""

import dataclasses
import math
from typing import Any

import numpy as np

from jattn.functional import compat
from jattn.functional.captures import Captures, Pure
from jattn.functional.compat import one_cpu_device as one_cpu_device
from jattn.functional.modifiers import Bias, Modifier, RelativeKey
from jattn.kernels.grid import Grid
from jattn.kernels.scoring import hoist_score
from jattn.request import Request

# On CPU a block's scores should fit into the cache, but XLA runs a matrix product on both cores
# only from 512 rows on. So a block has ROWS rows, and columns and examples for about SCORES scores
# (measured on two cores)
ROWS, SCORES = 512, 2**20
COLUMNS = 128, 1024  # at least and at most
# Additive scores have an intermediate of rows × columns × width: their blocks are smaller
BLOCK_BYTES = 2**24
# Blocks are halved only while rows or columns exceed the first number where a block holds a part of
# the batch, or the second where it holds the whole batch
LEAST = 32, 128


def choose_grid(request: Request) -> tuple[Grid, Pure, Captures]:
    """The grid, the score as a pure function of one of its blocks, and the captured arrays."""
    (*batch, _, N, _), T, S = request.query.shape, request.local_T, request.key.shape[-3]
    rows = block_size(T, ROWS)
    columns = block_size(S, min(max(SCORES // (N * rows), COLUMNS[0]), COLUMNS[1]))
    grid = Grid(tuple(batch), N, T, S, rows, columns, None)
    # On one CPU parts of a batch run one after another, each with the cost of its own length
    if batch and one_cpu_device() and not any(_needs_whole_batch(m) for m in request.modifiers):
        grid = dataclasses.replace(grid, examples=_examples(grid))
        try:
            return _small_enough(request, grid)
        except Exception:
            # The score may capture an array with batch axes, and so need the whole batch. If the
            # score is wrong, it raises again below
            grid = dataclasses.replace(grid, examples=None)
    return _small_enough(request, grid)


def _needs_whole_batch(modifier: Modifier) -> bool:
    """Whether parts of the batch would cost more than they save.

    A bias that is shared along some leading axes and not along others would be repeated along the
    former. Every part's gradient by the products of `relative_key` would be as large as all.
    """
    if isinstance(modifier, RelativeKey):
        return True
    batch = np.shape(modifier.array)[:-3] if isinstance(modifier, Bias) else ()
    return max(batch, default=1) > 1 and 1 in batch


def _small_enough(request: Request, grid: Grid) -> tuple[Grid, Pure, Captures]:
    """Make blocks smaller until the largest intermediate array of the score is small enough."""
    while True:
        captures = Captures(request.names, request.mesh, request.row_axes)
        score = hoist_score(request, grid, captures)
        ratio = _largest_intermediate(score.jaxpr) / BLOCK_BYTES
        smaller = grid
        while ratio > 1 and (next_one := _smaller(smaller)) is not None:
            ratio *= _area(next_one) / _area(smaller)
            smaller = next_one
        if smaller == grid:
            return grid, score, captures
        grid = smaller


def _area(grid: Grid) -> int:
    return grid.rows * grid.columns * (grid.examples or 1)


def _smaller(grid: Grid) -> Grid | None:
    """The next smaller grid, by examples first; None if this is the smallest."""
    if grid.examples is not None and grid.examples > 1:
        fewer = max(d for d in range(1, grid.examples) if grid.examples % d == 0)
        return dataclasses.replace(grid, examples=fewer)
    if max(grid.rows, grid.columns) <= LEAST[grid.examples is None]:
        return None
    if grid.rows >= grid.columns:
        return dataclasses.replace(grid, rows=block_size(grid.T, grid.rows // 2))
    return dataclasses.replace(grid, columns=block_size(grid.S, grid.columns // 2))


def _examples(grid: Grid) -> int:
    """How many examples share a block."""
    room = SCORES // (grid.num_heads * grid.rows * grid.columns)
    return nearest_divisor(math.prod(grid.batch), max(room, 1))


def block_size(length: int, largest: int) -> int:
    """The size of the fewest blocks of at most `largest` that cover an axis.

    It is exact where the axis divides, else a multiple of 16 or of what `largest` shares with it.

    Example:
      >>> block_size(1000, 512), block_size(1040, 512), block_size(1031, 512), block_size(7, 512)
      (500, 352, 352, 7)
    """
    count = math.ceil(length / largest)
    step = math.gcd(largest, 16) if length % count else 1
    return min(length, math.ceil(length / count / step) * step)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number nearest to what is wanted, as a ratio; at most four times as much.

    Example:
      >>> nearest_divisor(12, 5), nearest_divisor(31, 8)
      (6, 31)
    """
    divisors = [d for d in range(1, min(number, 4 * wanted) + 1) if number % d == 0]
    return min(divisors, key=lambda divisor: abs(math.log(divisor / wanted)))


def _largest_intermediate(jaxpr: compat.ClosedJaxpr) -> int:
    """Bytes of the largest array that a jaxpr makes."""
    made: list[Any] = [v.aval for e in compat.equations(jaxpr.jaxpr) for v in e.outvars]
    return max((math.prod(array.shape) * array.dtype.itemsize for array in made), default=0)
