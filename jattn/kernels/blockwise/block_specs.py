"""Which part of an array belongs to a block: read it, or add to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.kernels.grid import Grid

Array = jax.Array


class BlockSpec(NamedTuple):
    """How the grid divides an array into blocks; the name is Pallas's.

    Attributes:
      loops: for each of the first axes, the loop that runs over it: an index of `Index.parts`.
      rows, columns: the axes of queries and of keys, counted from the last; None: the array has
        none.
    """

    loops: tuple[int, ...] = ()
    rows: int | None = None
    columns: int | None = None


class Index(NamedTuple):
    """Indices of the loops: the part of the batch and the axes that `vmap` adds; row; column."""

    parts: tuple[Any, ...]
    i: Any
    j: Any

    @property
    def place(self) -> tuple[Any, Any, Any]:
        """Part of the batch, row and column: the block's place in the grid."""
        return self.parts[0], self.i, self.j


def block_shape(shape: tuple[int, ...], spec: BlockSpec, grid: Grid) -> tuple[int, ...]:
    """The shape of the part of an array that belongs to a block."""
    sizes = list(shape)
    if spec.rows is not None:
        sizes[spec.rows] = grid.rows
    if spec.columns is not None:
        sizes[spec.columns] = grid.columns
    return tuple(sizes[len(spec.loops) :])


def _slice_of(
    array: Array, spec: BlockSpec, grid: Grid, at: Index
) -> tuple[list[Any], tuple[int, ...]]:
    """The first index and the sizes of a block's part, along all axes of the array."""
    starts: list[Any] = [jnp.zeros((), jnp.int32)] * array.ndim
    for axis, loop in enumerate(spec.loops):
        starts[axis] = at.parts[loop]
    if spec.rows is not None:
        starts[spec.rows] = grid.row_start(at.i)
    if spec.columns is not None:
        starts[spec.columns] = grid.column_start(at.j)
    sizes = (1,) * len(spec.loops) + block_shape(array.shape, spec, grid)
    return [jnp.asarray(start, jnp.int32) for start in starts], sizes


def read(array: Array, spec: BlockSpec, grid: Grid, at: Index) -> Array:
    """The block's part of an array."""
    starts, sizes = _slice_of(array, spec, grid, at)
    if sizes != array.shape:
        array = jax.lax.dynamic_slice(array, starts, sizes)
    return array.reshape(sizes[len(spec.loops) :])


def add(array: Array, part: Array, spec: BlockSpec, grid: Grid, at: Index) -> Array:
    """Add a block's part to the array: the transpose of `read`."""
    starts, sizes = _slice_of(array, spec, grid, at)
    part = part.reshape(sizes)
    if sizes == array.shape:
        return array + part
    part = jax.lax.dynamic_slice(array, starts, sizes) + part
    return jax.lax.dynamic_update_slice(array, part, starts)
