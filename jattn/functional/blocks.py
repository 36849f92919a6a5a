"""A rectangle of the score matrix: what masks and modifiers are told about the entries they work on."""

import dataclasses
import math
from typing import Any, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jattn.functional import checks

Array = jax.Array
T = TypeVar("T")
Range = tuple[Any, int]  # start, which may be traced, and size

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and a pytree: Python values are static, arrays (and pytrees of them) are leaves.

    Example:
      >>> @pytree
      ... class Scale:
      ...     factor: object
      >>> jax.tree.leaves(Scale(2)), jax.tree.leaves(Scale(jnp.arange(2)))
      ([], [Array([0, 1], dtype=int32)])
    """
    made = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]

    def flatten(value):
        fields = {name: getattr(value, name) for name in names}
        static = {name: field for name, field in fields.items() if _is_static(field)}
        leaves = [field for name, field in fields.items() if name not in static]
        return leaves, (tuple(static.items()), tuple(name for name in names if name not in static))

    def unflatten(treedef, leaves):
        value = object.__new__(made)
        for name, field in (*treedef[0], *zip(treedef[1], leaves, strict=True)):
            object.__setattr__(value, name, field)
        return value

    jax.tree_util.register_pytree_node(made, flatten, unflatten)
    return made


def _is_static(field: Any) -> bool:
    if field is None or isinstance(field, (bool, int, float, str)):
        return True
    return callable(field) and jax.tree_util.all_leaves([field])


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows × columns of the scores `[..., N, T, S]`, over the whole batch and all heads, or over one of each.

    Slots say where an entry stands in the arrays; positions say where its token stands in the text. They differ where
    the caller passes positions of its own (a cache, a ragged prompt, a shard).

    Attributes:
      lead: the leading shape `...`.
      num_heads: N.
      rows: first query slot and number of rows.
      columns: first key slot and number of columns.
      positions: query positions `[T]` or `[..., T]` and key positions `[S]` or `[..., S]`; None: the slots.
      examples: the flat index of the first example and their number, or None for all.
      head: the index of one head, or None for all.
    """

    lead: tuple[int, ...]
    num_heads: int
    rows: Range
    columns: Range
    positions: tuple[Array, Array] | None = None
    examples: Range | None = None
    head: Any = None

    @classmethod
    def point(cls, b: Any, h: Any, q_idx: Any, k_idx: Any) -> Self:
        """The single entry of one example (of a batch with one leading axis), head, query and key.

        Example:
          >>> Block.point(0, 1, 2, 3).k_idx.shape
          (1, 1, 1, 1)
        """
        return cls((1,), 1, (q_idx, 1), (k_idx, 1), examples=(b, 1), head=h)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block's scores."""
        return (*self.batch, self.num_heads if self.head is None else 1, self.rows[1], self.columns[1])

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes of the block's scores: as many as `...` has, all examples of a part along the last."""
        return self.lead if self.examples is None else (1,) * (len(self.lead) - 1) + (self.examples[1],)

    @property
    def b(self) -> Array:
        """Flat batch index `[..., 1, 1, 1]`; 0 where there are no leading axes."""
        first, count = (0, math.prod(self.lead)) if self.examples is None else self.examples
        return (jnp.asarray(first, jnp.int32) + jnp.arange(count, dtype=jnp.int32)).reshape(*self.batch, 1, 1, 1)

    @property
    def h(self) -> Array:
        """Query head `[N, 1, 1]`."""
        if self.head is not None:
            return jnp.asarray(self.head, jnp.int32).reshape(1, 1, 1)
        return jnp.arange(self.num_heads, dtype=jnp.int32)[:, None, None]

    @property
    def q_slot(self) -> Array:
        """Query slots `[rows, 1]`."""
        return (self.rows[0] + jnp.arange(self.rows[1], dtype=jnp.int32))[:, None]

    @property
    def k_slot(self) -> Array:
        """Key slots `[columns]`."""
        return self.columns[0] + jnp.arange(self.columns[1], dtype=jnp.int32)

    @property
    def q_idx(self) -> Array:
        """Query positions `[..., 1, rows, 1]`."""
        indices = self.q_slot[:, 0] if self.positions is None else self._positions(self.positions[0], self.rows)
        return indices[..., None, :, None] if indices.ndim > 1 else self._pad(indices[:, None])

    @property
    def k_idx(self) -> Array:
        """Key positions `[..., 1, 1, columns]`."""
        indices = self.k_slot if self.positions is None else self._positions(self.positions[1], self.columns)
        return indices[..., None, None, :] if indices.ndim > 1 else self._pad(indices[None, :])

    @property
    def q_range(self) -> tuple[Array, Array]:
        """Lowest and highest query position of the block, each broadcastable to `[..., 1, 1, 1]`."""
        return self._range(self.q_idx, self.rows, -2)

    @property
    def k_range(self) -> tuple[Array, Array]:
        """Lowest and highest key position of the block, each broadcastable to `[..., 1, 1, 1]`."""
        return self._range(self.k_idx, self.columns, -1)

    def _range(self, indices: Array, window: Range, axis: int) -> tuple[Array, Array]:
        if self.positions is None:
            return jnp.asarray(window[0]), jnp.asarray(window[0] + window[1] - 1)
        return indices.min(axis, keepdims=True), indices.max(axis, keepdims=True)

    def of_example(self, array: Any) -> Array:
        """Pick `array [...]`, one value per example, as `[..., 1, 1, 1]`."""
        return self._examples(array)[..., None, None, None]

    def of_query(self, array: Any) -> Array:
        """Pick `array [..., T]`, one value per query slot, as `[..., 1, rows, 1]`."""
        return _cut(self._examples(array), -1, self.rows)[..., None, :, None]

    def of_key(self, array: Any) -> Array:
        """Pick `array [..., S]`, one value per key slot, as `[..., 1, 1, columns]`."""
        return _cut(self._examples(array), -1, self.columns)[..., None, None, :]

    def of_pair(self, array: Any) -> Array:
        """Pick `array`, broadcastable to `[..., N, T, S]`; axes of size 1 are kept."""
        array = jnp.asarray(array)
        array = array.reshape((1,) * max(0, 3 - array.ndim) + array.shape)
        heads = (0, self.num_heads) if self.head is None else (self.head, 1)
        for axis, window in ((-3, heads), (-2, self.rows), (-1, self.columns)):
            array = array if array.shape[axis] == 1 else _cut(array, axis, window)
        if self.examples is None or all(size == 1 for size in array.shape[:-3]):
            return array
        lead = array.shape[:-3] if len(self.lead) == 1 else self.lead
        return self._examples(jnp.broadcast_to(array, (*lead, *array.shape[-3:])))

    def _examples(self, array: Any) -> Array:
        array = jnp.asarray(array)
        if self.examples is None:
            return array
        rest = array.shape[len(self.lead) :]
        return _cut(array.reshape(-1, *rest), 0, self.examples).reshape(*self.batch, *rest)

    def _positions(self, indices: Array, window: Range) -> Array:
        return _cut(self._examples(indices) if indices.ndim > 1 else indices, -1, window)

    def _pad(self, array: Array) -> Array:
        return array.reshape((1,) * (len(self.lead) + 3 - array.ndim) + array.shape)


def _cut(array: Array, axis: int, window: Range) -> Array:
    start, size = window
    if isinstance(start, int) and start == 0 and size == array.shape[axis]:
        return array
    checks.in_range("a block's start", start, 0, array.shape[axis] - size, f"axis {axis} of an array {array.shape}")
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
