"""In which dtype sums are kept, and indices compared."""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import checks


def accumulator(dtype: Any) -> Any:
    """The dtype in which sums are kept: float32 for float16 and bfloat16, else the dtype itself.

    Example:
      >>> accumulator(jnp.bfloat16)
      dtype('float32')
    """
    return jnp.dtype(jnp.float32) if is_half(dtype) else jnp.dtype(dtype)


def is_half(dtype: Any) -> bool:
    """Whether a dtype is floating point of fewer than 32 bits.

    Example:
      >>> is_half(jnp.float16), is_half(jnp.float32), is_half(jnp.int8)
      (True, False, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32)


def indices(array: Any) -> jax.Array:
    """Integers as int32, or as int64 where they come so and may not fit.

    Known values are checked against int32 where they are given; traced ones are not.

    Example:
      >>> indices(jnp.arange(2, dtype=jnp.uint8)).dtype
      dtype('int32')
    """
    is_concrete = checks.concrete(array) is not None
    array = jnp.asarray(array)
    return array.astype(jnp.int32 if is_concrete or array.dtype.itemsize <= 4 else jnp.int64)


def together(*arrays: Any) -> list[jax.Array]:
    """Integers in one dtype that holds them all: int64 if one of them has it, else int32.

    Example:
      >>> [array.dtype.name for array in together(jnp.arange(2), 3)]
      ['int32', 'int32']
    """
    made = [indices(array) for array in arrays]
    wide = any(array.dtype == jnp.int64 for array in made)
    return [array.astype(jnp.int64 if wide else jnp.int32) for array in made]


def lengths(array: Any) -> jax.Array:
    """Lengths as int32; a traced one beyond its range counts as the nearest: no axis is longer.

    Example:
      >>> lengths(jnp.array([3, 5], jnp.uint8)).dtype
      dtype('int32')
    """
    array = jnp.asarray(array)
    most = min(2**31 - 1, jnp.iinfo(array.dtype).max)
    return jnp.clip(array, jnp.asarray(0, array.dtype), jnp.asarray(most, array.dtype)).astype(
        jnp.int32
    )
