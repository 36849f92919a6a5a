"""One matrix product for all: half precision is multiplied as it comes and summed in float32.

JAX itself transposes such a product into float32 × float32, which accelerators compute many times
as slowly. Here the cotangent is rounded to the operands' dtype before it is multiplied.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import compat, dtypes

Array = jax.Array


def product(x: Array, y: Array, contract: tuple[int, int] = (-1, -1)) -> Array:
    """Matrix products over one of the last two axes of each operand.

        result[..., i, j] = Σ_c x[..., i, c] · y[..., j, c]      for contract = (−1, −1)

    Args:
      x: `[..., i, c]`, or `[..., c, i]` where `contract[0]` is −2.
      y: `[..., j, c]`, or `[..., c, j]` where `contract[1]` is −2; leading axes broadcast.
      contract: the axis of each over which is summed.

    Returns:
      `[..., i, j]`, float32 for half-precision operands, else in their dtype.

    Example:
      >>> product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((5, 3), jnp.bfloat16)).dtype
      dtype('float32')
    """
    if x.ndim > max(2, y.ndim - 1) and math.prod(y.shape[:-2]) == 1 and contract[0] == -1:
        # One matrix for all: one product
        count = math.prod(x.shape[:-1])
        rows = product(x.reshape(count, x.shape[-1]), y.reshape(y.shape[-2:]), contract)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])
    lead = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (jnp.broadcast_to(array, (*lead, *array.shape[-2:])) for array in (x, y))
    if not dtypes.is_half(x.dtype):
        return _run(x, y, contract=contract, precision=None)[0]
    (result,) = _half_product(x, y, contract=contract, precision=_ambient_precision())
    return result


def _ambient_precision() -> Any:
    return jax.config.jax_default_matmul_precision


def _run(x, y, *, contract, precision):
    """The product as `dot_general`; operands of either precision, sums in at least float32."""
    over = tuple((x.ndim + axis,) for axis in contract)
    lead = tuple(range(x.ndim - 2))
    with jax.default_matmul_precision(precision) if precision else _NoContext():
        dtype = dtypes.accumulator(x.dtype)
        return [jax.lax.dot_general(x, y, (over, (lead, lead)), preferred_element_type=dtype)]


def _run_on_cpu(x, y, *, contract, precision):
    """Widened: there it is faster, and the same numbers, for products of halves are exact."""
    wide = (array.astype(jnp.float32) for array in (x, y))
    return _run(*wide, contract=contract, precision="highest")


def _shapes(x, y, *, contract, precision):
    sizes = x.shape[-3 - contract[0]], y.shape[-3 - contract[1]]
    return [compat.kind_like(x, (*x.shape[:-2], *sizes), dtypes.accumulator(x.dtype))]


def _jvp(primals, tangents, **params):
    terms = []
    for k in (0, 1):
        if tangents[k] is not None:
            operands = [tangents[k] if k == n else primals[n] for n in (0, 1)]
            terms.append(_half_product(*operands, **params)[0])
    return _half_product(*primals, **params), [sum(terms[1:], terms[0]) if terms else None]


def _transpose(cotangents, x, y, *, kinds, contract, precision):
    (cotangent,), (dtype,) = cotangents, {kind.dtype for kind in kinds}
    if cotangent is None:
        return [None]
    cotangent = cotangent.astype(dtype)
    known, side = (y, -1) if x is None else (x, -2)
    own, other = contract if x is None else contract[::-1]
    (result,) = _half_product(
        cotangent, known, contract=(side, -3 - other), precision=precision
    )  # [..., its free axis, the contracted axis]
    return [(result if own == -1 else result.mT).astype(dtype)]


def _batch(arrays, axes, **params):
    (size,) = {a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None}
    moved = [
        jnp.broadcast_to(array, (size, *array.shape))
        if axis is None
        else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    return _half_product(*moved, **params), [0]


class _NoContext:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


_half_product = compat.primitive(
    "half_product", _run, _shapes, _jvp, _transpose, _batch, run_on_cpu=_run_on_cpu
)
