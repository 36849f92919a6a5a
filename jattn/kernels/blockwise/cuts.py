"""What a block reads of an array, and adds to one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.kernels.grid import Grid

Array = jax.Array


class Cut(NamedTuple):
    """How the grid cuts an array: what a block reads of it, or adds to it.

    Attributes:
      loops: which loops over parts its first axes belong to, one entry each; see `Index`.
      rows, columns: the axes, counted from the last, that are cut as queries or as keys are.
    """

    loops: tuple[int, ...] = ()
    rows: int | None = None
    columns: int | None = None


class Index(NamedTuple):
    """Where the loops stand: part of the batch, and what `vmap` put around it; row; column."""

    parts: tuple[Any, ...]
    i: Any
    j: Any

    @property
    def place(self) -> tuple[Any, Any, Any]:
        """Part of the batch, row and column: the block's place in the grid."""
        return self.parts[0], self.i, self.j


def block_shape(shape: tuple[int, ...], cut: Cut, grid: Grid) -> tuple[int, ...]:
    """The shape of a block's part."""
    sizes = list(shape)
    if cut.rows is not None:
        sizes[cut.rows] = grid.rows
    if cut.columns is not None:
        sizes[cut.columns] = grid.columns
    return tuple(sizes[len(cut.loops) :])


def _window(array: Array, cut: Cut, grid: Grid, at: Index) -> tuple[list[Any], tuple[int, ...]]:
    """Where in an array a block begins, and its sizes with those of loops."""
    starts: list[Any] = [jnp.zeros((), jnp.int32)] * array.ndim
    for axis, loop in enumerate(cut.loops):
        starts[axis] = at.parts[loop]
    if cut.rows is not None:
        starts[cut.rows] = grid.row_start(at.i)
    if cut.columns is not None:
        starts[cut.columns] = grid.column_start(at.j)
    sizes = (1,) * len(cut.loops) + block_shape(array.shape, cut, grid)
    return [jnp.asarray(start, jnp.int32) for start in starts], sizes


def read(array: Array, cut: Cut, grid: Grid, at: Index) -> Array:
    """The block's part of an array."""
    starts, sizes = _window(array, cut, grid, at)
    if sizes != array.shape:
        array = jax.lax.dynamic_slice(array, starts, sizes)
    return array.reshape(sizes[len(cut.loops) :])


def add(array: Array, part: Array, cut: Cut, grid: Grid, at: Index) -> Array:
    """The array with a block's part added: the transpose of `read`."""
    starts, sizes = _window(array, cut, grid, at)
    part = part.reshape(sizes)
    if sizes == array.shape:
        return array + part
    part = jax.lax.dynamic_slice(array, starts, sizes) + part
    return jax.lax.dynamic_update_slice(array, part, starts)
