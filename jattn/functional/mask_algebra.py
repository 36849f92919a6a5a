"""What every mask can do: evaluate or classify blocks, combine by `& | ~`, fill an array, draw."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks
from jattn.functional.block import FULL, PARTIAL, Block
from jattn.functional.pytree import pytree

Array = jax.Array
# Leading shape, N, T and S; None for a size that is not known
ImpliedShape = tuple[tuple[int, ...], int | None, int | None, int | None]
LARGEST_PICTURE = 32  # queries and keys that printing a mask draws


class Mask:
    """A set of (query, key) pairs. Make one with a function of this module."""

    def rule(self, block: Block) -> Array:
        """Which entries of the block are allowed: boolean, broadcastable to the block's scores."""
        raise NotImplementedError

    def classify(self, block: Block) -> Array:
        """Whether the block is EMPTY (0), PARTIAL (1) or FULL (2) for each example and head.

        The result is broadcastable to `[..., N, 1, 1]`. A mask that cannot tell returns PARTIAL.
        """
        return jnp.asarray(PARTIAL)

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        """Raise a `ValueError` if the mask does not fit scores `[*batch, num_heads, T, S]`."""

    def implied_shape(self) -> ImpliedShape:
        """The leading shape, N, T and S that the mask's own arrays imply: `()` or None if none."""
        return (), None, None, None

    def reads_slots(self) -> bool:
        """Whether the rule reads places in the arrays of queries and keys, not positions."""
        return False

    def __call__(self, b: Any, h: Any, q_idx: Any, k_idx: Any) -> Array:
        """Whether one entry is allowed. Arrays that the mask holds must have one batch axis."""
        return self.rule(Block.point(b, h, q_idx, k_idx)).reshape(())

    def to_array(
        self, T: int, S: int, *, batch: tuple[int, ...] | None = None, num_heads: int = 1
    ) -> Array:
        """Write the mask as one boolean array.

        Args:
          T: number of queries.
          S: number of keys.
          batch: the leading shape; None takes it from the mask's own arrays.
          num_heads: N, for masks that differ between heads.

        Returns:
          Boolean `[T, S]`, or `[..., N or 1, T, S]` if the mask differs between examples or heads.

        Raises:
          ValueError: the mask's own arrays do not fit these sizes.
        """
        batch = self.implied_shape()[0] if batch is None else batch
        self.check(batch, num_heads, T, S)
        allowed = self.rule(Block(batch, num_heads, (0, T), (0, S)))
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:-2], T, S))
        return allowed.reshape(T, S) if allowed.size == T * S and not batch else allowed

    def draw(self, T: int | None = None, S: int | None = None, *, b: int = 0, h: int = 0) -> str:
        """Draw the mask as text: a row per query, `█` where it may attend.

        Args:
          T: number of queries; None takes it from the mask's own arrays, or 8.
          S: number of keys; None takes it from the mask's own arrays, or 8.
          b: flat index of the example.
          h: query head.

        Raises:
          ValueError: the mask's own arrays do not fit these sizes.

        Example:
          >>> from jattn.functional.masks import causal
          >>> print(causal().draw(2, 3))
          █ · ·
          █ █ ·
        """
        T, S = self._lengths(T, S)
        batch, N, *_ = self.implied_shape()
        self.check(batch, N or h + 1, T, S)
        return self._draw_corner(T, S, b, h)

    def _lengths(self, T: int | None, S: int | None) -> tuple[int, int]:
        _, _, own_T, own_S = self.implied_shape()
        return T or own_T or own_S or 8, S or own_S or own_T or 8

    def _draw_corner(self, rows: int, columns: int, b: int = 0, h: int = 0) -> str:
        batch, N, *_ = self.implied_shape()
        N = N or h + 1
        with jax.ensure_compile_time_eval():
            allowed = np.asarray(self.rule(Block(batch, N, (0, rows), (0, columns))))
        picture = np.broadcast_to(allowed, (*batch, N, rows, columns)).reshape(-1, N, rows, columns)
        lines = (" ".join("█" if entry else "·" for entry in row) for row in picture[b, h])
        return "\n".join(lines)

    def __str__(self) -> str:
        if any(checks.concrete(leaf) is None for leaf in jax.tree.leaves(self)):
            return repr(self)
        T, S = self._lengths(None, None)
        rows, columns = min(T, LARGEST_PICTURE), min(S, LARGEST_PICTURE)
        picture = f"{self!r}\n{self._draw_corner(rows, columns)}"
        if (rows, columns) == (T, S):
            return picture
        return f"{picture}\n… the first {rows} of {T} queries, {columns} of {S} keys"

    def __and__(self, other: "Mask") -> "Mask":
        return _And(self, _as_mask(other))

    def __or__(self, other: "Mask") -> "Mask":
        return _Or(self, _as_mask(other))

    __array_ufunc__ = None  # so that `array & mask` calls the mask, which raises a clear error

    def __rand__(self, other: Any) -> "Mask":
        return _as_mask(other) & self

    def __ror__(self, other: Any) -> "Mask":
        return _as_mask(other) | self

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask has no truth value: combine masks with & | ~ instead of and, or, not"
        )

    def __invert__(self) -> "Mask":
        return _Not(self)


class SlotMask(Mask):
    """A mask whose rule reads slots."""

    def reads_slots(self) -> bool:
        """It does."""
        return True


def _as_mask(mask: Any) -> Mask:
    if not isinstance(mask, Mask):
        use = (
            "masks.mask_mod(function), or call it" if callable(mask) else "masks.from_array(array)"
        )
        raise TypeError(f"a mask combines with masks only, got {type(mask).__name__}: use {use}")
    return mask


@pytree
class _And(Mask):
    left: Mask
    right: Mask

    def reads_slots(self) -> bool:
        return self.left.reads_slots() or self.right.reads_slots()

    def rule(self, block: Block) -> Array:
        return self.left.rule(block) & self.right.rule(block)

    def classify(self, block: Block) -> Array:
        return jnp.minimum(self.left.classify(block), self.right.classify(block))

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        self.left.check(batch, num_heads, T, S)
        self.right.check(batch, num_heads, T, S)

    def implied_shape(self) -> ImpliedShape:
        (a_batch, *a), (b_batch, *b) = self.left.implied_shape(), self.right.implied_shape()
        N, T, S = (max(x or 0, y or 0) or None for x, y in zip(a, b, strict=True))
        return np.broadcast_shapes(a_batch, b_batch), N, T, S

    def __repr__(self) -> str:
        return " & ".join(
            f"({part!r})" if isinstance(part, _Or) else repr(part)
            for part in (self.left, self.right)
        )


@pytree
class _Or(_And):
    def rule(self, block: Block) -> Array:
        return self.left.rule(block) | self.right.rule(block)

    def classify(self, block: Block) -> Array:
        return jnp.maximum(self.left.classify(block), self.right.classify(block))

    def __repr__(self) -> str:
        return f"{self.left!r} | {self.right!r}"


@pytree
class _Not(Mask):
    mask: Mask

    def reads_slots(self) -> bool:
        return self.mask.reads_slots()

    def rule(self, block: Block) -> Array:
        return ~self.mask.rule(block)

    def classify(self, block: Block) -> Array:
        return FULL - self.mask.classify(block)

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        self.mask.check(batch, num_heads, T, S)

    def implied_shape(self) -> ImpliedShape:
        return self.mask.implied_shape()

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _And) else f"~{self.mask!r}"
