"""One matrix product for all: it multiplies half precision without a cast and sums in float32.

JAX transposes such a product into float32 × float32, which is many times slower on accelerators.
Here the other operand, a cotangent too, is rounded to the half-precision dtype first. On CPU, where
float32 products are faster, the product casts the rounded operands to float32.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jattn.functional import compat, dtypes

Array = jax.Array


def product(x: Array, y: Array, contract: tuple[int, int] = (-1, -1), dtype: Any = None) -> Array:
    """Matrix products over one of the last two axes of each operand.

        result[..., i, j] = Σ_c x[..., i, c] · y[..., j, c]      for contract = (−1, −1)

    Args:
      x: `[..., i, c]`, or `[..., c, i]` where `contract[0]` is −2.
      y: `[..., j, c]`, or `[..., c, j]` where `contract[1]` is −2; leading axes broadcast.
      contract: the axis of each over which is summed.
      dtype: in which operands are multiplied, if it is half precision; None: that of an operand
        which has half precision.

    Returns:
      `[..., i, j]`, float32 where operands are multiplied in half precision, else in their dtype.

    Example:
      >>> product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((5, 3))).dtype
      dtype('float32')
    """
    if x.ndim > max(2, y.ndim - 1) and math.prod(y.shape[:-2]) == 1 and contract[0] == -1:
        # One matrix for all: one product
        count = math.prod(x.shape[:-1])
        matrix = y.reshape(y.shape[-2:])
        rows = product(x.reshape(count, x.shape[-1]), matrix, contract, dtype)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (jnp.broadcast_to(array, (*batch, *array.shape[-2:])) for array in (x, y))
    x, y = compat.vary_alike((x, y))
    halves = [d for d in (dtype, x.dtype, y.dtype) if d is not None and dtypes.is_half(d)]
    if not halves:
        return _product(x, y, contract, None)
    if compat.is_explicit((x, y)):  # JAX says where the result lies
        return _product(x.astype(halves[0]), y.astype(halves[0]), contract, None)
    options = {
        "contract": contract,
        "precision": compat.ambient_precision(),
        "dtype": jnp.dtype(halves[0]),
    }
    return _half_product(x, y, **options)[0]


def grouped_product(x: Array, y: Array, contract: tuple[int, int], dtype: Any = None) -> Array:
    """The `product` of every member of a group with the one matrix that they share.

    The rows of all G members make one matrix product.

    Args:
      x: `[..., G, i, c]`.
      y: `[..., j, c]`, or `[..., c, j]` where `contract[1]` is −2.
      contract: as in `product`; `contract[0]` is −1.
      dtype: as in `product`.

    Returns:
      `[..., G, i, j]`, in the dtype of `product`.

    Example:
      >>> grouped_product(jnp.ones((3, 2, 4)), jnp.ones((5, 4)), (-1, -1)).shape
      (3, 2, 5)
    """
    rows = rearrange(x, "... G i c -> ... (G i) c")
    return rearrange(product(rows, y, contract, dtype), "... (G i) j -> ... G i j", G=x.shape[-3])


def _product(x: Array, y: Array, contract: tuple[int, int], precision: str | None) -> Array:
    over = (x.ndim + contract[0],), (x.ndim + contract[1],)
    batch = tuple(range(x.ndim - 2))
    at = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
    dtype = dtypes.accumulator(x.dtype)
    with at:
        return jax.lax.dot_general(x, y, (over, (batch, batch)), preferred_element_type=dtype)


# The product in half precision, as an operation with rules of its own


def _run(x: Array, y: Array, *, contract: Any, precision: Any, dtype: Any) -> list[Array]:
    return [_product(x.astype(dtype), y.astype(dtype), contract, precision)]


def _run_on_cpu(x: Array, y: Array, *, contract: Any, precision: Any, dtype: Any) -> list[Array]:
    return [_product(x.astype(jnp.float32), y.astype(jnp.float32), contract, "highest")]


def _shapes(x: Any, y: Any, *, contract: Any, precision: Any, dtype: Any) -> list[Any]:
    sizes = x.shape[-3 - contract[0]], y.shape[-3 - contract[1]]
    return [compat.aval_like(x, (*x.shape[:-2], *sizes), jnp.float32)]


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> Any:
    x, y = primals
    terms = [
        _half_product(*operands, **params)[0]
        for tangent, operands in zip(tangents, ((tangents[0], y), (x, tangents[1])), strict=True)
        if tangent is not None
    ]
    return _half_product(x, y, **params), [sum(terms[1:], terms[0]) if terms else None]


def _transpose(
    cotangents: Sequence[Any],
    x: Any,
    y: Any,
    *,
    avals: Any,
    contract: Any,
    precision: Any,
    dtype: Any,
) -> list[Any]:
    (cotangent,), (aval,) = cotangents, avals
    if cotangent is None:
        return [None]
    # [..., i, j] times [..., j, c] is [..., i, c]: the free axis of the operand, the contracted one
    other_operand, side, own, other = (y, -1, *contract) if x is None else (x, -2, *contract[::-1])
    options = {"contract": (side, -3 - other), "precision": precision, "dtype": dtype}
    (result,) = _half_product(cotangent, other_operand, **options)
    return [(result if own == -1 else result.mT).astype(aval.dtype)]


def _batch(arrays: Sequence[Array], axes: Sequence[int | None], **params: Any) -> Any:
    (size,) = {a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None}

    def at_front(array: Array, axis: int | None) -> Array:
        if axis is None:
            return jnp.broadcast_to(array, (size, *array.shape))
        return jnp.moveaxis(array, axis, 0)

    return _half_product(*map(at_front, arrays, axes), **params), [0]


_half_product = compat.primitive(
    "half_product", _run, _shapes, _jvp, _transpose, _batch, run_on_cpu=_run_on_cpu
)
