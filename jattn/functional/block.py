"""A rectangle of the score matrix: what masks and modifiers know of the entries they work on."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from jattn.functional import checks

Array = jax.Array
Range = tuple[Any, int]  # start, which may be traced, and size

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows × columns of the scores `[..., N, T, S]`, for all examples and heads or for some.

    A slot is an entry's index in the arrays; a position is its token's index in the text. They
    differ where the caller passes positions: a cache, a ragged prompt, a shard. Every array that a
    block gives has the rank of its scores, so that broadcasting never adds an axis.

    Attributes:
      batch: the leading shape `...` of all scores.
      num_heads: N.
      rows: first query slot and number of rows.
      columns: first key slot and number of columns.
      positions: query positions `[T]` or `[..., T]` and key positions `[S]` or `[..., S]`; None:
        the slots.
      examples: the flat index of the first example and the number of examples; None: all.
      head: the index of one head; None: all.
      allowed: which entries count, broadcastable to the scores; None: all.
    """

    batch: tuple[int, ...]
    num_heads: int
    rows: Range
    columns: Range
    positions: tuple[Array, Array] | None = None
    examples: Range | None = None
    head: Any = None
    allowed: Array | None = None

    @classmethod
    def point(cls, b: Any, h: Any, q_idx: Any, k_idx: Any) -> Self:
        """One entry: an example (of a batch with one leading axis), a head, a query and a key.

        Example:
          >>> Block.point(0, 1, 2, 3).k_idx.shape
          (1, 1, 1, 1)
        """
        return cls((1,), 1, (q_idx, 1), (k_idx, 1), examples=(b, 1), head=h)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block's scores."""
        heads = self.num_heads if self.head is None else 1
        return (*self.block_batch, heads, self.rows[1], self.columns[1])

    @property
    def block_batch(self) -> tuple[int, ...]:
        """The leading shape of the block's scores: `batch`, or `(1, …, 1, number of examples)`."""
        if self.examples is None:
            return self.batch
        return (1,) * (len(self.batch) - 1) + (self.examples[1],)

    @property
    def b(self) -> Array:
        """Flat batch index `[..., 1, 1, 1]`; 0 where there are no leading axes."""
        examples = (0, math.prod(self.batch)) if self.examples is None else self.examples
        return _indices(examples).reshape(*self.block_batch, 1, 1, 1)

    @property
    def h(self) -> Array:
        """Query head `[..., N, 1, 1]`."""
        if self.head is None:
            return self._full_rank(jnp.arange(self.num_heads, dtype=jnp.int32), -3)
        return self._full_rank(jnp.asarray(self.head, jnp.int32).reshape(1), -3)

    @property
    def q_slot(self) -> Array:
        """Query slots `[..., 1, rows, 1]`."""
        return self._full_rank(_indices(self.rows), -2)

    @property
    def k_slot(self) -> Array:
        """Key slots `[..., 1, 1, columns]`."""
        return self._full_rank(_indices(self.columns), -1)

    @property
    def q_idx(self) -> Array:
        """Query positions `[..., 1, rows, 1]`."""
        return self.q_slot if self.positions is None else self.of_query(self.positions[0])

    @property
    def k_idx(self) -> Array:
        """Key positions `[..., 1, 1, columns]`."""
        return self.k_slot if self.positions is None else self.of_key(self.positions[1])

    @property
    def distance(self) -> Array:
        """|i − j| of positions as uint32: exact for all of int32, where i − j may overflow.

        Example:
          >>> int(Block.point(0, 0, -1, 2**31 - 1).distance.reshape(()))
          2147483648
        """
        q_idx, k_idx = self.q_idx.astype(jnp.uint32), self.k_idx.astype(jnp.uint32)
        return jnp.where(self.q_idx >= self.k_idx, q_idx - k_idx, k_idx - q_idx)

    @property
    def q_range(self) -> tuple[Array, Array]:
        """Lowest and highest query position, each broadcastable to `[..., 1, 1, 1]`."""
        return self._low_and_high(self.q_idx, self.rows, -2)

    @property
    def k_range(self) -> tuple[Array, Array]:
        """Lowest and highest key position, each broadcastable to `[..., 1, 1, 1]`."""
        return self._low_and_high(self.k_idx, self.columns, -1)

    def _low_and_high(self, indices: Array, slots: Range, axis: int) -> tuple[Array, Array]:
        if self.positions is None:
            return jnp.asarray(slots[0]), jnp.asarray(slots[0] + slots[1] - 1)
        return indices.min(axis, keepdims=True), indices.max(axis, keepdims=True)

    def of_example(self, array: Any) -> Array:
        """Pick `array [...]`, one value per example, as `[..., 1, 1, 1]`."""
        return self._of_examples(array)[..., None, None, None]

    def of_query(self, array: Any) -> Array:
        """Pick `array [T]` or `[..., T]`, one value per query slot, as `[..., 1, rows, 1]`."""
        array = self._of_examples(array) if jnp.ndim(array) > 1 else jnp.asarray(array)
        return self._full_rank(_slice(array, -1, self.rows), -2)

    def of_key(self, array: Any) -> Array:
        """Pick `array [S]` or `[..., S]`, one value per key slot, as `[..., 1, 1, columns]`."""
        array = self._of_examples(array) if jnp.ndim(array) > 1 else jnp.asarray(array)
        return self._full_rank(_slice(array, -1, self.columns), -1)

    def of_pair(self, array: Any) -> Array:
        """Pick `array`, broadcastable to `[..., N, T, S]`; axes of size 1 are kept."""
        return self._part(array, (-2, self.rows), (-1, self.columns))

    def of_rows(self, array: Any) -> Array:
        """Pick `array [..., N, T, n]`, n numbers for each query, as `[..., N, rows, n]`."""
        return self._part(array, (-2, self.rows))

    def of_columns(self, array: Any) -> Array:
        """Pick `array [..., N, S, n]`, n numbers for each key, as `[..., N, columns, n]`."""
        return self._part(array, (-2, self.columns))

    def _part(self, array: Any, *slots: tuple[int, Range]) -> Array:
        """Pick examples, heads and slots; axes of size 1 are kept."""
        array = jnp.asarray(array)
        array = array.reshape((1,) * (len(self.batch) + 3 - array.ndim) + array.shape)
        heads = (0, self.num_heads) if self.head is None else (self.head, 1)
        for axis, indices in ((-3, heads), *slots):
            array = array if array.shape[axis] == 1 else _slice(array, axis, indices)
        if self.examples is None or all(size == 1 for size in array.shape[:-3]):
            return array
        batch = array.shape[:-3] if len(self.batch) == 1 else self.batch
        return self._of_examples(jnp.broadcast_to(array, (*batch, *array.shape[-3:])))

    def _of_examples(self, array: Any) -> Array:
        array = jnp.asarray(array)
        if self.examples is None:
            return array
        rest = array.shape[len(self.batch) :]
        flat = _slice(array.reshape(-1, *rest), 0, self.examples)
        return flat.reshape(*self.block_batch, *rest)

    def _full_rank(self, array: Array, axis: int) -> Array:
        """`[..., n]` in the rank of the scores: leading axes stay, n moves to `axis`."""
        batch = array.shape[:-1] or (1,) * len(self.batch)
        last_three = [1, 1, 1]
        last_three[axis] = array.shape[-1]
        return array.reshape(*batch, *last_three)


def _indices(indices: Range) -> Array:
    start, size = indices
    return jnp.asarray(start, jnp.int32) + jnp.arange(size, dtype=jnp.int32)


def _slice(array: Array, axis: int, indices: Range) -> Array:
    start, size = indices
    if isinstance(start, int) and start == 0 and size == array.shape[axis]:
        return array
    last, of_array = array.shape[axis] - size, f"axis {axis} of an array {array.shape}"
    checks.assert_in_range("a block's start", start, 0, last, of_array)
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
