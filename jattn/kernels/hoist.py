"""Turn callables that capture arrays into pure functions of those arrays, so that a gradient rule can see them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as core


def hoist(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Split a callable into a pure function and the arrays that it captures, float, integer or traced.

    Args:
      function: from arrays to one array.
      *arguments: arrays or `jax.ShapeDtypeStruct`s of the shapes with which it will be called.

    Returns:
      `pure` and `captured` with `pure(captured, *arguments) == function(*arguments)`.

    Example:
      >>> import jax.numpy as jnp
      >>> scale = jnp.arange(3.0)
      >>> pure, captured = hoist(lambda x: x * scale, jnp.ones(3))
      >>> pure([array + 1 for array in captured], jnp.ones(3))
      Array([1., 2., 3.], dtype=float32)
    """
    closed = jax.make_jaxpr(function)(*arguments)

    def pure(captured, *arguments):
        closed_again = core.ClosedJaxpr(closed.jaxpr, list(captured))
        return core.jaxpr_as_fun(closed_again)(*jax.tree.leaves(arguments))[0]

    return pure, list(closed.consts)
