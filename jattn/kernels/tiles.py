"""The grid of blocks into which a blockwise kernel cuts the scores `[..., N, T, S]`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as core
import jax.numpy as jnp

from jattn.functional.blocks import EMPTY, FULL, PARTIAL, Block
from jattn.functional.masks import Mask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block (i, j) holds `rows` queries from `i · rows` and `columns` keys from `j · columns` on.

    The last block of an axis ends where the axis ends, so that nothing is padded: it starts early, and entries that the
    block before it holds too are not fresh. With `examples` a block belongs to part b of the batch, so many examples.

    Attributes:
      lead, num_heads, T, S: the shape of the scores.
      rows, columns: the shape of a block.
      positions: as in `Block`.
      examples: how many examples a block holds, a divisor of the batch; None: the whole batch, with all its axes.
    """

    lead: tuple[int, ...]
    num_heads: int
    T: int
    S: int
    rows: int
    columns: int
    positions: tuple[Array, Array] | None
    examples: int | None

    @property
    def num_rows(self) -> int:
        """Blocks along the queries."""
        return math.ceil(self.T / self.rows)

    @property
    def num_columns(self) -> int:
        """Blocks along the keys."""
        return math.ceil(self.S / self.columns)

    @property
    def overlap(self) -> bool:
        """Whether the last block of queries or of keys overlaps the one before."""
        return self.T % self.rows > 0 or self.S % self.columns > 0

    def row_start(self, i: Any) -> Any:
        """First query slot of row i of blocks."""
        return jnp.minimum(i * self.rows, self.T - self.rows)

    def column_start(self, j: Any) -> Any:
        """First key slot of column j of blocks."""
        return jnp.minimum(j * self.columns, self.S - self.columns)

    def block(self, b: Any, i: Any, j: Any) -> Block:
        """Block (i, j), of part b of the batch."""
        rows, columns = (self.row_start(i), self.rows), (self.column_start(j), self.columns)
        part = None if self.examples is None else (b * self.examples, self.examples)
        return Block(self.lead, self.num_heads, rows, columns, self.positions, part)

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes of a block: one for several examples, none for one; or those of the whole batch."""
        return self.lead if self.examples is None else (self.examples,) * (self.examples > 1)

    def own_axes(self, array: Array) -> Array:
        """What a rule returned for a block, broadcastable to `[..., N, rows, columns]`, with the block's batch axes."""
        return array if self.examples is None else array.reshape(*(-1,) * len(self.batch), *array.shape[-3:])

    def allowed(self, mask: Mask | None, b: Any, i: Any, j: Any) -> Array:
        """Which entries of block (i, j) count: allowed by the mask, and fresh."""
        block = self.block(b, i, j)
        fresh = ((block.q_slot >= i * self.rows) & (block.k_slot >= j * self.columns))[None]
        return fresh if mask is None else fresh & self.own_axes(mask.rule(block))

    def classify(self, mask: Mask | None, b: Any, i: Any) -> Array:
        """EMPTY, PARTIAL or FULL for every block of row i, over all its heads and examples: `[num_columns]`."""

        def one(j):
            overlap = (self.row_start(i) != i * self.rows) | (self.column_start(j) != j * self.columns)
            whole = jnp.where(overlap, PARTIAL, FULL)
            if mask is None:
                return whole
            classes = mask.classify(self.block(b, i, j))
            uniform = jnp.where((classes == FULL).all(), whole, PARTIAL)
            return jnp.where((classes == EMPTY).all(), EMPTY, uniform)

        return jax.vmap(one)(jnp.arange(self.num_columns, dtype=jnp.int32))

    def parts(self, batched: Sequence[Array]) -> list[Array]:
        """The numbers of the parts of the batch, and arrays `[..., a, b]` as `[parts, *batch, a, b]`."""
        count = math.prod(self.lead) // (self.examples or 1)
        cut = [array.reshape(count, *self.batch, *array.shape[len(self.lead) :]) for array in batched]
        return [jnp.arange(count, dtype=jnp.int32), *cut]

    # Explicit biases, [B or 1, N or 1, T or 1, S or 1], are read and written one block at a time.

    def cut(self, bias: Array, b: Any, i: Any, j: Any) -> Array:
        """The block's part of a bias."""
        starts, sizes = self._window(bias, b, i, j)
        part = jax.lax.dynamic_slice(bias, starts, sizes)
        if self.examples is not None:
            return self.own_axes(part)
        return part.reshape(*(self.lead if part.shape[0] > 1 else (1,) * len(self.lead)), *part.shape[1:])

    def add(self, bias: Array, part: Array, b: Any, i: Any, j: Any) -> Array:
        """The bias with a block's part added: the transpose of `cut`."""
        starts, sizes = self._window(bias, b, i, j)
        part = jax.lax.dynamic_slice(bias, starts, sizes) + part.reshape(sizes).astype(bias.dtype)
        return jax.lax.dynamic_update_slice(bias, part, starts)

    def _window(self, bias: Array, b: Any, i: Any, j: Any) -> tuple[list[Any], list[int]]:
        examples, heads, T, S = bias.shape
        zero = jnp.zeros((), jnp.int32)
        count = self.examples or examples
        starts = [b * count if examples > count else zero, zero]
        starts += [self.row_start(i) if T > 1 else zero, self.column_start(j) if S > 1 else zero]
        rows, columns = (self.rows if T > 1 else 1), (self.columns if S > 1 else 1)
        return starts, [min(examples, count), heads, rows, columns]


def four_axes(bias: Array, lead: tuple[int, ...]) -> Array:
    """A bias broadcastable to `[..., N, T, S]` with exactly one batch axis, of size 1 if all examples share it."""
    bias = jnp.asarray(bias)
    bias = bias.reshape((1,) * (len(lead) + 3 - bias.ndim) + bias.shape)
    if any(size > 1 for size in bias.shape[:-3]):
        bias = jnp.broadcast_to(bias, (*lead, *bias.shape[-3:]))
    return bias.reshape(-1, *bias.shape[-3:])


def block_size(length: int, largest: int) -> int:
    """The size of the fewest blocks of at most `largest` that cover an axis: exactly, or in even multiples of 16.

    Example:
      >>> block_size(1000, 512), block_size(1040, 512), block_size(1031, 512), block_size(7, 512)
      (500, 352, 352, 7)
    """
    count = math.ceil(length / largest)
    step = math.gcd(largest, 16) if length % count else 1
    return min(length, math.ceil(length / count / step) * step)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is nearest to what is wanted, as a ratio; at most four times as much.

    Example:
      >>> nearest_divisor(12, 5), nearest_divisor(31, 8)
      (6, 31)
    """
    divisors = [divisor for divisor in range(1, min(number, 4 * wanted) + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: abs(math.log(divisor / wanted)))


def largest_intermediate(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of the largest array that a function makes on its way.

    Example:
      >>> largest_intermediate(lambda x: (x[:, None] * x).sum(), jnp.zeros(8))
      256
    """
    return _largest(jax.make_jaxpr(function)(*arguments).jaxpr)


def _largest(jaxpr: core.Jaxpr) -> int:
    made: list[Any] = [var.aval for eqn in jaxpr.eqns for var in eqn.outvars]
    sizes = [math.prod(array.shape) * array.dtype.itemsize for array in made]
    inner = [part for eqn in jaxpr.eqns for part in core.jaxprs_in_params(eqn.params)]
    return max([*sizes, *map(_largest, inner)], default=0)
