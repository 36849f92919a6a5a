"""What masks are made of: integers that are one or one per example, and the class of a block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks, dtypes
from jattn.functional.block import EMPTY, FULL, PARTIAL, Block

Array = jax.Array


def class_of(*, empty: Array, full: Array) -> Array:
    """EMPTY where a block is empty, FULL where it is full, PARTIAL elsewhere."""
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL))


def integer(name: str, value: Any) -> Any:
    """A Python integer, or an array of integers as it comes; else an error that names it."""
    if isinstance(value, (bool, np.bool_)) or not (
        isinstance(value, (int, np.integer)) or hasattr(value, "dtype")
    ):
        raise TypeError(f"{name} must be an integer or an array of integers, got {value!r}")
    checks.assert_index(**{name: value})
    return int(value) if isinstance(value, (int, np.integer)) else value


def integers(name: str, value: Any) -> Any:
    """An array of integers as it comes, or a list as a NumPy array; else an error that names it."""
    value = value if hasattr(value, "dtype") else np.asarray(value)
    checks.assert_index(**{name: value})
    return value


def is_array(value: Any) -> bool:
    """Whether what `integer` gave is an array."""
    return not isinstance(value, int)


def per_example(block: Block, value: Any) -> Any:
    """What `integer` gave for the examples of a block: a scalar, or `[..., 1, 1, 1]`."""
    if not is_array(value):
        return value
    value = dtypes.indices(value)
    return block.of_example(value) if value.ndim > 0 else value


def check_per_example(name: str, value: Any, batch: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless an integer is one, or one per example."""
    if np.shape(value) not in {(), batch}:
        raise ValueError(
            f"{name} must be one integer or one per example {batch}, got shape {np.shape(value)}"
        )


def show(value: Any) -> str:
    """An integer or an array as it stands in the name of a mask: a long one by its shape."""
    if not is_array(value):
        return str(value)
    concrete = checks.concrete(value)
    return (
        f"array of shape {np.shape(value)}"
        if concrete is None or concrete.size > 8
        else str(concrete.tolist())
    )
