"""The same numbers in another layout: channels last, or leading axes as one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def nearest(array: np.ndarray, like: Any) -> np.ndarray | None:
    """PyTorch's array in the layout in which it is nearest to the port's.

    PyTorch's convolutions have channels in front of space, Flax's behind; a Linear may take all
    vectors as one matrix.

    Args:
      array: PyTorch's.
      like: the port's array.

    Returns:
      The array as it is, with its second axis last, or reshaped; None: none of them fits.

    Example:
      >>> nearest(np.ones((2, 3, 5)), np.ones((6, 5))).shape, nearest(np.ones(2), np.ones(3))
      ((6, 5), None)
    """
    found = [each for each in _layouts(array) if each.shape == like.shape]
    if array.shape[-1:] == like.shape[-1:] and array.size == like.size and not found:
        found = [array.reshape(like.shape)]
    if len(found) < 2:
        return found[0] if found else None
    return min(found, key=lambda each: _distance(each, like))


def _layouts(array: np.ndarray) -> list[np.ndarray]:
    return [array, np.moveaxis(array, 1, -1)] if array.ndim > 2 else [array]


def _distance(one: np.ndarray, other: Any) -> float:
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).sum())


def error(
    found: Sequence[Any] | None, expected: Sequence[np.ndarray], *, exact: bool = False
) -> float | None:
    """The largest difference over the largest number, in whatever layout; None: none fits.

    Args:
      found: the port's arrays; None: there are none.
      expected: PyTorch's; of more, the first are taken.
      exact: whether the shapes must be the same.

    Example:
      >>> error([np.array([2.0, 4.0])], [np.array([2.0, 5.0])]), error([np.ones(3)], [np.ones(2)])
      (0.2, None)
    """
    errors = []
    for one, other in zip(found or (), expected, strict=False):
        fitting = nearest(np.asarray(other), one)
        if fitting is None or (exact and fitting.shape != np.shape(other)):
            return None
        errors.append(largest_difference(np.asarray(one, np.float64), fitting))
    return max(errors, default=None)


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference over the largest finite number; equal infinities are equal.

    Example:
      >>> largest_difference(np.array([-np.inf, 2.0]), np.array([-np.inf, 4.0]))
      0.5
      >>> largest_difference(np.array([np.inf]), np.array([1.0]))
      inf
    """
    unlike = one != other
    scale = float(np.abs(other[np.isfinite(other)]).max(initial=0.0)) or 1.0
    if not unlike.any():
        return 0.0
    found = float(np.abs(one[unlike] - other[unlike]).max())
    return found / scale if math.isfinite(found) else math.inf
