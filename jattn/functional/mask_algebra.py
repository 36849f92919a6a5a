"""Every mask can be evaluated, classified, combined, materialised and drawn.

A mask is evaluated or classified on a block; `& | ~` combine masks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks
from jattn.functional.block import FULL, PARTIAL, Block
from jattn.functional.pytree import pytree

Array = jax.Array
LARGEST_PICTURE = 32  # queries and keys that printing a mask draws


class Mask:
    """A set of (query, key) pairs. Make one with a function of this module."""

    def rule(self, block: Block) -> Array:
        """Tell which entries of the block may be attended to.

        The result is boolean and broadcastable to `[..., N, rows, columns]`.
        """
        raise NotImplementedError

    def classify(self, block: Block) -> Array:
        """Tell for each example whether the block is EMPTY (0), PARTIAL (1) or FULL (2).

        The result is broadcastable to `[..., N, 1, 1]`; in doubt it is PARTIAL.
        """
        return jnp.asarray(PARTIAL)

    def check(self, lead: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        """Raise a `ValueError` if the mask does not fit scores `[*lead, num_heads, T, S]`."""

    def extent(self) -> tuple[tuple[int, ...], int | None, int | None, int | None]:
        """Return the leading shape, N, T and S that the mask's own arrays imply.

        Where they imply none, the leading shape is `()` and a size is None.
        """
        return (), None, None, None

    def __call__(self, b: Any, h: Any, q_idx: Any, k_idx: Any) -> Array:
        """One entry, from scalars; arrays of the mask are read as having one batch axis."""
        return self.rule(Block.point(b, h, q_idx, k_idx)).reshape(())

    def to_array(
        self, T: int, S: int, *, batch: tuple[int, ...] | None = None, num_heads: int = 1
    ) -> Array:
        """Materialise the mask.

        Args:
          T: number of queries.
          S: number of keys.
          batch: the leading shape; None takes it from the mask's own arrays.
          num_heads: N, for masks that differ between heads.

        Returns:
          Boolean `[T, S]`, or `[..., N or 1, T, S]` if the mask differs between examples or heads.
        """
        lead = self.extent()[0] if batch is None else batch
        self.check(lead, num_heads, T, S)
        allowed = self.rule(Block(lead, num_heads, (0, T), (0, S)))
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:-2], T, S))
        return allowed.reshape(T, S) if allowed.size == T * S and not lead else allowed

    def draw(self, T: int | None = None, S: int | None = None, *, b: int = 0, h: int = 0) -> str:
        """Draw the mask of flat example b and head h: a row per query, `█` where it may attend.

        Example:
          >>> from jattn.functional.masks import causal
          >>> print(causal().draw(2, 3))
          █ · ·
          █ █ ·
        """
        T, S = self._lengths(T, S)
        lead, N, *_ = self.extent()
        self.check(lead, N or h + 1, T, S)
        return self._draw_corner(T, S, b, h)

    def _lengths(self, T: int | None, S: int | None) -> tuple[int, int]:
        _, _, own_T, own_S = self.extent()
        return T or own_T or own_S or 8, S or own_S or own_T or 8

    def _draw_corner(self, rows: int, columns: int, b: int = 0, h: int = 0) -> str:
        lead, N, *_ = self.extent()
        N = N or h + 1
        with jax.ensure_compile_time_eval():
            allowed = np.asarray(self.rule(Block(lead, N, (0, rows), (0, columns))))
        picture = np.broadcast_to(allowed, (*lead, N, rows, columns)).reshape(-1, N, rows, columns)
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

    __array_ufunc__ = None  # let NumPy leave `array & mask` to the mask, which refuses it by name

    def __rand__(self, other: Any) -> "Mask":
        return _as_mask(other) & self

    def __ror__(self, other: Any) -> "Mask":
        return _as_mask(other) | self

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask is neither true nor false: combine masks with & | ~, not with and, or, not"
        )

    def __invert__(self) -> "Mask":
        return _Not(self)


def _as_mask(mask: Any) -> Mask:
    if not isinstance(mask, Mask):
        way = (
            "call it first, or lift it with masks.mask_mod"
            if callable(mask)
            else "masks.from_array(array)"
        )
        raise TypeError(f"a mask combines with masks only, got {type(mask).__name__}: {way}")
    return mask


@pytree
class _And(Mask):
    left: Mask
    right: Mask

    def rule(self, block):
        return self.left.rule(block) & self.right.rule(block)

    def classify(self, block):
        return jnp.minimum(self.left.classify(block), self.right.classify(block))

    def check(self, lead, num_heads, T, S):
        self.left.check(lead, num_heads, T, S)
        self.right.check(lead, num_heads, T, S)

    def extent(self):
        (a_lead, *a), (b_lead, *b) = self.left.extent(), self.right.extent()
        sizes = (max(x or 0, y or 0) or None for x, y in zip(a, b, strict=True))
        return np.broadcast_shapes(a_lead, b_lead), *sizes

    def __repr__(self):
        return " & ".join(
            f"({part!r})" if isinstance(part, _Or) else repr(part)
            for part in (self.left, self.right)
        )


@pytree
class _Or(_And):
    def rule(self, block):
        return self.left.rule(block) | self.right.rule(block)

    def classify(self, block):
        return jnp.maximum(self.left.classify(block), self.right.classify(block))

    def __repr__(self):
        return f"{self.left!r} | {self.right!r}"


@pytree
class _Not(Mask):
    mask: Mask

    def rule(self, block):
        return ~self.mask.rule(block)

    def classify(self, block):
        return FULL - self.mask.classify(block)

    def check(self, lead, num_heads, T, S):
        self.mask.check(lead, num_heads, T, S)

    def extent(self):
        return self.mask.extent()

    def __repr__(self):
        return f"~({self.mask!r})" if isinstance(self.mask, _And) else f"~{self.mask!r}"
