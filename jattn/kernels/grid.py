"""The grid of blocks into which a kernel divides the scores `[..., N, T, S]`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional.block import EMPTY, FULL, PARTIAL, Block
from jattn.functional.masks import Mask

Array = jax.Array
Positions = tuple[Array, Array] | None


@dataclasses.dataclass(frozen=True)
class Grid:
    """Block (i, j) holds `rows` queries from `i · rows` and `columns` keys from `j · columns` on.

    The last block of an axis starts early, so that it ends where the axis ends: no array is padded.
    An entry that two blocks hold counts only in the first of them. With `examples`, a block belongs
    to part b of the batch, and a part holds that number of examples.

    Where queries are sharded over devices, each device has its own grid with its own T. `first` is
    then the slot of its first query.

    Attributes:
      batch, num_heads, T, S: the shape of the scores.
      rows, columns: the shape of a block.
      examples: how many examples a block holds, a divisor of the batch; None: the whole batch,
        with all its axes.
    """

    batch: tuple[int, ...]
    num_heads: int
    T: int
    S: int
    rows: int
    columns: int
    examples: int | None

    @property
    def num_rows(self) -> int:
        """Blocks along the queries."""
        return 1 if self.rows == self.T else math.ceil(self.T / self.rows)

    @property
    def num_columns(self) -> int:
        """Blocks along the keys."""
        return 1 if self.columns == self.S else math.ceil(self.S / self.columns)

    @property
    def num_parts(self) -> int:
        """Parts of the batch."""
        return 1 if self.examples is None else math.prod(self.batch) // self.examples

    @property
    def block_batch(self) -> tuple[int, ...]:
        """The batch axes of a block: all; with `examples`, one axis, or none for one example."""
        return self.batch if self.examples is None else (self.examples,) * (self.examples > 1)

    @property
    def overlap(self) -> bool:
        """Whether the last block of queries or of keys overlaps the one before."""
        return self.num_rows * self.rows > self.T or self.num_columns * self.columns > self.S

    def row_start(self, i: Any) -> Any:
        """First query slot of row i of blocks."""
        return jnp.minimum(i * self.rows, self.T - self.rows)

    def column_start(self, j: Any) -> Any:
        """First key slot of column j of blocks."""
        return jnp.minimum(j * self.columns, self.S - self.columns)

    def block(self, positions: Positions, b: Any, i: Any, j: Any, first: Any) -> Block:
        """Block (i, j), of part b of the batch."""
        rows = first + self.row_start(i), self.rows
        columns = self.column_start(j), self.columns
        part = None if self.examples is None else (b * self.examples, self.examples)
        return Block(self.batch, self.num_heads, rows, columns, positions, part)

    def with_block_batch(self, array: Array) -> Array:
        """Reshape a rule's result for a block to the axes `[*block_batch, N, rows, columns]`."""
        if self.examples is None:
            return array
        return array.reshape(*(-1,) * len(self.block_batch), *array.shape[-3:])

    def allowed(
        self, mask: Mask | None, positions: Positions, b: Any, i: Any, j: Any, first: Any
    ) -> Array:
        """Which entries of block (i, j) count: the mask allows them, no earlier block has them."""
        block = self.block(positions, b, i, j, first)
        is_new = (block.q_slot >= first + i * self.rows) & (block.k_slot >= j * self.columns)
        return self.with_block_batch(is_new if mask is None else is_new & mask.rule(block))

    def classes(self, mask: Mask | None, positions: Positions, b: Any, i: Any, first: Any) -> Array:
        """EMPTY, PARTIAL or FULL, over all heads and examples, in row i: `[num_columns]`."""

        def one(j: Array) -> Array:
            overlaps = (self.row_start(i) != i * self.rows) | (
                self.column_start(j) != j * self.columns
            )
            whole = jnp.where(overlaps, PARTIAL, FULL)
            if mask is None:
                return whole
            classes = mask.classify(self.block(positions, b, i, j, first))
            uniform = jnp.where((classes == FULL).all(), whole, PARTIAL)
            return jnp.where((classes == EMPTY).all(), EMPTY, uniform)

        columns = jnp.arange(self.num_columns, dtype=jnp.int32)
        return jnp.asarray(jax.vmap(one)(columns), jnp.int8)

    def parts(self, array: Array) -> Array:
        """`[..., a, b, c]` as `[parts, *block_batch, a, b, c]`."""
        return array.reshape(self.num_parts, *self.block_batch, *array.shape[len(self.batch) :])
