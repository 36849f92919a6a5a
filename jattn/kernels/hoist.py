"""Turn callables that capture arrays into pure functions of those arrays, so that a gradient rule can see them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as core
import jax.numpy as jnp


def hoist(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Split a callable into a pure function and the arrays that it captures, float, integer or traced.

    Args:
      function: from arrays to one array.
      *arguments: arrays or `jax.ShapeDtypeStruct`s of the shapes with which it will be called.

    Returns:
      `pure` and `captured` with `pure(captured, *arguments) == function(*arguments)`.

    Example:
      >>> scale = jnp.arange(3.0)
      >>> pure, captured = hoist(lambda x: x * scale, jnp.ones(3))
      >>> pure([array + 1 for array in captured], jnp.ones(3))
      Array([1., 2., 3.], dtype=float32)
    """
    closed = jax.make_jaxpr(function)(*arguments)
    captured = [jnp.asarray(const) for const in closed.consts]

    def rebound(captured, *arguments):
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, list(captured)))(*jax.tree.leaves(arguments))[0]

    pure = jax.make_jaxpr(rebound)(captured, *arguments)  # traced again, lest it keep alive what it captured
    return lambda captured, *arguments: core.jaxpr_as_fun(pure)(*jax.tree.leaves((captured, arguments)))[0], captured


def split(captured: Any) -> tuple[Any, Any]:
    """Arrays that gradients may flow into and all others, each with None in the place of the other.

    Example:
      >>> split([jnp.ones(2)])  # known values need no gradient
      ([None], [Array([1., 1.], dtype=float32)])
    """

    def moves(array):
        return isinstance(array, jax.core.Tracer) and jnp.issubdtype(array.dtype, jnp.inexact)

    moving = jax.tree.map(lambda array: array if moves(array) else None, captured)
    fixed = jax.tree.map(lambda array: None if moves(array) else array, captured)
    return moving, fixed


def join(moving: Any, fixed: Any) -> Any:
    """The inverse of `split`.

    Example:
      >>> join([1.0, None], [None, 2])
      [1.0, 2]
    """
    return jax.tree.map(lambda a, b: b if a is None else a, moving, fixed, is_leaf=lambda leaf: leaf is None)
