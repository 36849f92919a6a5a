"""A mask says which query may attend to which key: True = may attend.

Combine masks with `&`, `|` and `~`.

A mask can be evaluated on any block of the score matrix, so that no `[T, S]` array has to exist. It
is a pytree: Python integers in it are static; arrays (lengths, ids) are leaves and may be traced.

`causal`, `sliding_window`, `chunked_local`, `no_self` and callables see positions; the others see
slots, the indices of the arrays. The two are the same unless the caller of `attend` passes
positions.

Example:
  >>> print(causal() & no_self())
  causal() & no_self()
  · · · · · · · ·
  █ · · · · · · ·
  █ █ · · · · · ·
  █ █ █ · · · · ·
  █ █ █ █ · · · ·
  █ █ █ █ █ · · ·
  █ █ █ █ █ █ · ·
  █ █ █ █ █ █ █ ·
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks, dtypes, mask_parts
from jattn.functional.block import PARTIAL, Block
from jattn.functional.mask_algebra import ImpliedShape, SlotMask
from jattn.functional.mask_algebra import Mask as Mask
from jattn.functional.named_masks import block_diffusion as block_diffusion
from jattn.functional.named_masks import chunked_local as chunked_local
from jattn.functional.named_masks import documents as documents
from jattn.functional.named_masks import tree as tree
from jattn.functional.pytree import pytree

Array = jax.Array


def causal(offset: int | Array = 0) -> Mask:
    """A query sees itself and what came before it.

        j ≤ i + offset

    Args:
      offset: the number of later keys that are visible, too; with S > T, `S − T` aligns the ends.
        An integer, or an integer array `[]` or `[...]` with one offset per example.

    Raises:
      TypeError: the offset is not an integer or an array of integers.
      ValueError: an offset is beyond 32 bits.

    Example:
      >>> print(causal().draw(3, 4))
      █ · · ·
      █ █ · ·
      █ █ █ ·
    """
    return _Causal(mask_parts.integer("offset", offset))


def sliding_window(left: int | Array, right: int | Array = 0) -> Mask:
    """A query sees its own position, `left` keys before it and `right` after it.

        i − left ≤ j ≤ i + right

    Args:
      left: integer, or integer array `[]` or `[...]` with one per example.
      right: the same.

    Raises:
      TypeError: left or right is not an integer or an array of integers.
      ValueError: the window is empty, left + right < 0; or a number is beyond 32 bits.

    Paper: Beltagy et al. 2020, https://arxiv.org/abs/2004.05150

    Example:
      >>> print(sliding_window(1).draw(4, 4))
      █ · · ·
      █ █ · ·
      · █ █ ·
      · · █ █
    """
    left, right = mask_parts.integer("left", left), mask_parts.integer("right", right)
    if isinstance(left, int) and isinstance(right, int) and left + right < 0:
        raise ValueError(
            f"sliding_window must hold a key, left + right ≥ 0, got left = {left}, right = {right}"
        )
    return _SlidingWindow(left, right)


def padding(lengths: Array) -> Mask:
    """A query sees the first `length` keys; the others are padding.

        j < length

    Args:
      lengths: integers `[...]` (one per example) or `[..., T]` (one per query), from 0 to S. A
        traced length above S allows all S keys.

    Raises:
      TypeError: lengths are not integers.
      ValueError: in `attend`, if a known length lies outside 0 … S.

    Example:
      >>> print(padding(np.array(2)).draw(3, 4))
      █ █ · ·
      █ █ · ·
      █ █ · ·
    """
    return _Padding(mask_parts.integers("lengths", lengths))


def prefix_lm(lengths: Array) -> Mask:
    """A query sees the prefix, itself and what came before it: `causal() | padding(lengths)`.

        j < length  or  j ≤ i

    Args:
      lengths: of the prefixes, integers `[...]` or `[..., T]`, from 0 to S.

    Raises:
      TypeError: lengths are not integers.

    Paper: Raffel et al. 2020, https://arxiv.org/abs/1910.10683

    Example:
      >>> print(prefix_lm(np.array(2)).draw(4, 4))
      █ █ · ·
      █ █ · ·
      █ █ █ ·
      █ █ █ █
    """
    return causal() | padding(lengths)


def segments(q_ids: Array, k_ids: Array | None = None) -> Mask:
    """A query sees the keys of its own segment (document) in a packed sequence.

        q_ids[i] = k_ids[j]

    Args:
      q_ids: integers `[..., T]`.
      k_ids: integers `[..., S]`; None: the same as `q_ids`, for self-attention.

    Raises:
      TypeError: ids are not integers.
      ValueError: an id is beyond 32 bits.

    Example:
      >>> print(segments(np.array([0, 0, 1, 1])))
      segments([4], [4])
      █ █ · ·
      █ █ · ·
      · · █ █
      · · █ █
    """
    q_ids = mask_parts.integers("q_ids", q_ids)
    return _Segments(q_ids, q_ids if k_ids is None else mask_parts.integers("k_ids", k_ids))


def no_self() -> Mask:
    """A query sees every key but the one at its own position.

        j ≠ i

    With it, attention predicts each value from all others: leave-one-out.

    Example:
      >>> print(no_self().draw(3, 3))
      · █ █
      █ · █
      █ █ ·
    """
    return _NoSelf()


def from_array(array: Any) -> Mask:
    """A query sees the keys that a boolean array allows.

        array[..., n, i, j]

    Args:
      array: boolean, True = may attend, broadcastable to `[..., N, T, S]`; `[T, S]` is shared by
        all examples and heads.

    Raises:
      TypeError: the array is not boolean.

    Example:
      >>> print(from_array(np.array([[True, False], [True, True]])))
      from_array([2, 2])
      █ ·
      █ █
    """
    if type(array).__module__.partition(".")[0] == "torch":
        raise TypeError(
            "a mask array must be one of JAX or NumPy (True = may attend), got a torch.Tensor: use "
            "interop.torch_masks for a mask of PyTorch's layers, where True hides"
        )
    array = array if hasattr(array, "dtype") else np.asarray(array)
    if array.dtype != bool:
        must = f"a mask array must be boolean (True = may attend), got {array.dtype}"
        if jnp.issubdtype(array.dtype, jnp.floating):
            torch = "interop.torch_masks for a mask of PyTorch's layers"
            raise TypeError(f"{must}: use modifiers.bias to add an array to the scores, {torch}")
        raise TypeError(f"{must}: use mask.astype(bool)")
    return _Dense(array)


def mask_mod(
    function: Callable[[Array, Array, Array, Array], Array],
    bounds: Callable[[Array, Array, Array, Array], Array] | None = None,
) -> Mask:
    """Make a mask of a callable `(b, h, q_idx, k_idx) -> bool`, so that `& | ~` apply to it.

    Args:
      function: takes scalars: the flat batch index, the query head and the positions of query and
        key. It may capture arrays; one that it indexes must be a JAX array, because the indices
        are traced.
      bounds: `(q_low, q_high, k_low, k_high) -> EMPTY | PARTIAL | FULL` on scalars, both ends
        inclusive. With it a kernel skips EMPTY blocks and evaluates `function` on PARTIAL ones
        alone.

    Raises:
      TypeError: `function` is not callable.

    Paper: the signature of FlexAttention, Dong et al. 2024, https://arxiv.org/abs/2412.05496

    Example:
      >>> print(mask_mod(lambda b, h, q_idx, k_idx: (q_idx - k_idx) % 2 == 0).draw(3, 4))
      █ · █ ·
      · █ · █
      █ · █ ·
    """
    if not callable(function):
        raise TypeError(
            f"mask_mod takes a callable (b, h, q_idx, k_idx) -> bool, got {type(function).__name__}"
        )
    return _Mod(function, bounds)


@pytree
class _Causal(Mask):
    offset: Any

    def rule(self, block: Block) -> Array:
        return _at_most(
            block.k_idx, _shift(block.q_idx, mask_parts.per_example(block, self.offset))
        )

    def classify(self, block: Block) -> Array:
        offset, (k_low, k_high) = mask_parts.per_example(block, self.offset), block.k_range
        first_end, last_end = (_shift(q, offset) for q in block.q_range)
        return mask_parts.class_of(
            empty=~_at_most(k_low, last_end), full=_at_most(k_high, first_end)
        )

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        mask_parts.check_per_example("offset", self.offset, batch)

    def implied_shape(self) -> ImpliedShape:
        return np.shape(self.offset), None, None, None

    def __repr__(self) -> str:
        shown = (
            mask_parts.show(self.offset) if mask_parts.is_array(self.offset) or self.offset else ""
        )
        return f"causal({shown})"


@pytree
class _SlidingWindow(Mask):
    left: Any
    right: Any

    def rule(self, block: Block) -> Array:
        first, last = self._ends(block, block.q_idx)
        return _at_most(first, block.k_idx) & _at_most(block.k_idx, last)

    def _ends(self, block: Block, q_idx: Array) -> tuple[Array, Array]:
        """First and last key position that queries see."""
        left, right = (mask_parts.per_example(block, number) for number in (self.left, self.right))
        return _shift(q_idx, -left), _shift(q_idx, right)

    def classify(self, block: Block) -> Array:
        k_low, k_high = block.k_range
        low, high = (self._ends(block, q_idx) for q_idx in block.q_range)
        empty = ~(_at_most(low[0], k_high) & _at_most(k_low, high[1]))
        return mask_parts.class_of(
            empty=empty, full=_at_most(high[0], k_low) & _at_most(k_high, low[1])
        )

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        mask_parts.check_per_example("left", self.left, batch)
        mask_parts.check_per_example("right", self.right, batch)

    def implied_shape(self) -> ImpliedShape:
        return np.broadcast_shapes(np.shape(self.left), np.shape(self.right)), None, None, None

    def __repr__(self) -> str:
        return f"sliding_window({mask_parts.show(self.left)}, {mask_parts.show(self.right)})"


@pytree
class _Padding(SlotMask):
    lengths: Any

    def _of_block(self, block: Block) -> Array:
        """Lengths `[..., 1, rows or 1, 1]`."""
        per_query = np.ndim(self.lengths) == len(block.batch) + 1
        pick = block.of_query if per_query else block.of_example
        return pick(dtypes.lengths(self.lengths))

    def rule(self, block: Block) -> Array:
        return block.k_slot < self._of_block(block)

    def classify(self, block: Block) -> Array:
        lengths, (start, size) = self._of_block(block), block.columns
        shortest, longest = lengths.min(-2, keepdims=True), lengths.max(-2, keepdims=True)
        return mask_parts.class_of(empty=start >= longest, full=start + size <= shortest)

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        shape = np.shape(self.lengths)
        if shape not in {batch, (*batch, T)}:
            raise ValueError(
                f"padding lengths must be [...] = {batch} (one per example) or [..., T] = "
                f"{(*batch, T)} (one per query), got shape {shape}"
            )
        checks.assert_in_range("padding lengths", self.lengths, 0, S, "S, the number of keys")

    def implied_shape(self) -> ImpliedShape:
        lengths = checks.concrete(self.lengths)
        longest = None if lengths is None or lengths.size == 0 else max(int(lengths.max()), 1)
        return np.shape(self.lengths)[:1], None, (np.shape(self.lengths)[1:] or (None,))[0], longest

    def __repr__(self) -> str:
        return f"padding({mask_parts.show(self.lengths)})"


@pytree
class _Segments(SlotMask):
    q_ids: Any
    k_ids: Any

    def rule(self, block: Block) -> Array:
        q_ids, k_ids = self._of_block(block)
        return q_ids == k_ids

    def _of_block(self, block: Block) -> tuple[Array, Array]:
        """Ids of queries `[..., 1, rows, 1]` and of keys `[..., 1, 1, columns]`."""
        q_ids, k_ids = dtypes.together(self.q_ids, self.k_ids)
        return block.of_query(q_ids), block.of_key(k_ids)

    def classify(self, block: Block) -> Array:
        q_ids, k_ids = self._of_block(block)
        q_low, q_high = q_ids.min(-2, keepdims=True), q_ids.max(-2, keepdims=True)
        k_low, k_high = k_ids.min(-1, keepdims=True), k_ids.max(-1, keepdims=True)
        all_equal = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return mask_parts.class_of(empty=(q_high < k_low) | (k_high < q_low), full=all_equal)

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        for name, ids, shape in (
            ("q_ids", self.q_ids, (*batch, T)),
            ("k_ids", self.k_ids, (*batch, S)),
        ):
            if np.shape(ids) != shape:
                raise ValueError(f"segments {name} must have shape {shape}, got {np.shape(ids)}")

    def implied_shape(self) -> ImpliedShape:
        return np.shape(self.q_ids)[:-1], None, np.shape(self.q_ids)[-1], np.shape(self.k_ids)[-1]

    def __repr__(self) -> str:
        return f"segments({list(np.shape(self.q_ids))}, {list(np.shape(self.k_ids))})"


@pytree
class _NoSelf(Mask):
    def rule(self, block: Block) -> Array:
        return block.k_idx != block.q_idx

    def classify(self, block: Block) -> Array:
        (q_low, q_high), (k_low, k_high) = block.q_range, block.k_range
        all_equal = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return mask_parts.class_of(empty=all_equal, full=(q_high < k_low) | (k_high < q_low))

    def __repr__(self) -> str:
        return "no_self()"


@pytree
class _Dense(SlotMask):
    array: Any

    def rule(self, block: Block) -> Array:
        return block.of_pair(self.array)

    def classify(self, block: Block) -> Array:
        allowed = self.rule(block)
        empty = ~allowed.any((-2, -1), keepdims=True)
        return mask_parts.class_of(empty=empty, full=allowed.all((-2, -1), keepdims=True))

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        checks.assert_broadcastable("mask", self.array, (*batch, num_heads, T, S), "[..., N, T, S]")

    def implied_shape(self) -> ImpliedShape:
        shape = np.shape(self.array)
        N, T, S = (size if size != 1 else None for size in (None, None, None, *shape)[-3:])
        return shape[:-3], N, T, S

    def __repr__(self) -> str:
        return f"from_array({list(np.shape(self.array))})"


@pytree
class _Mod(Mask):
    function: Any
    bounds: Any

    def rule(self, block: Block) -> Array:
        entries = block.b, block.h, block.q_idx, block.k_idx
        allowed = checks.entrywise("mask", "(b, h, q_idx, k_idx)", self.function, *entries)
        if allowed.dtype != bool:
            raise TypeError(f"a mask_mod must return a boolean, got {allowed.dtype}")
        return allowed

    def classify(self, block: Block) -> Array:
        if self.bounds is None:
            return jnp.asarray(PARTIAL)
        return jnp.asarray(jnp.vectorize(self.bounds)(*block.q_range, *block.k_range))

    def __repr__(self) -> str:
        return f"mask_mod({getattr(self.function, '__name__', type(self.function).__name__)})"


def _at_most(first: Any, second: Any) -> Array:
    first, second = dtypes.together(first, second)
    return first <= second


def _shift(position: Array, offset: Any) -> Array:
    """position + offset, clipped to int32 where the sum would overflow."""
    if isinstance(offset, int) and offset == 0:
        return position
    position, offset = dtypes.together(position, offset)
    total = position + offset
    if total.dtype == jnp.int64:
        return total
    lowest, highest = (jnp.asarray(end, jnp.int32) for end in (-(2**31), 2**31 - 1))
    up = jnp.where(total < position, highest, total)
    down = jnp.where(total > position, lowest, total)
    return jnp.where(offset >= 0, up, down)
