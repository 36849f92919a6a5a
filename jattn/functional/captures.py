"""Turn callables that capture arrays into pure functions of those arrays.

A score, a mask or a modifier may close over anything: parameters, lengths, tracers of an enclosing
`jit`, `grad` or `vmap`. A kernel with its own loops and derivative rules must see these
arrays as operands, or gradients would not reach them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import compat

Array = jax.Array


class Pure:
    """A function `(captured, *arguments) -> arrays` that holds no array.

    Two of them are equal if they do the same: so a compiled program is found again, though the
    caller wrote the lambda anew.
    """

    def __init__(self, jaxpr: compat.ClosedJaxpr, places: tuple[int, ...], results: Any) -> None:
        """Make one of a jaxpr without constants.

        `places` says where in the captured arrays its own stand; `results` is the structure of the
        pytree that it returns.
        """
        self.jaxpr, self.places, self.results = jaxpr, places, results

    def __call__(self, captured: list[Array], *arguments: Any) -> Any:
        """Evaluate it."""
        own = [captured[place] for place in self.places]
        leaves = compat.vary_alike(jax.tree.leaves((own, arguments)))
        return jax.tree.unflatten(self.results, compat.jaxpr_as_fun(self.jaxpr)(*leaves))

    @functools.cached_property
    def _fingerprint(self) -> Any:
        try:
            return self.places, self.results, compat.fingerprint(self.jaxpr)
        except TypeError:  # it equals itself alone
            return id(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pure) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)


class Captures:
    """The arrays that several callables hold or capture, each once.

    Attributes:
      arrays: what is captured: float, integer, traced or not.
      names: axes of an enclosing `jax.shard_map` over which the kernel will make all arrays vary.
      mesh: a mesh with explicit axes, on which the kernel will run as if they were automatic.
      manual: the axes of this mesh over which the kernel will enter a `jax.shard_map`.
    """

    def __init__(
        self, names: frozenset[str] = frozenset(), mesh: Any = None, manual: tuple[str, ...] = ()
    ) -> None:
        """Begin with none."""
        self.arrays: list[Array] = []
        self._given: list[tuple[Any, Array]] = []
        self.names, self.mesh, self.manual = names, mesh, manual

    def hoist(self, function: Callable[..., Any], holder: Any, *arguments: Any) -> Pure:
        """Make a callable pure in what it holds and captures.

        Args:
          function: `(holder, *arguments)`, from arrays to arrays.
          holder: a pytree of which the function reads arrays: masks, modifiers, `Partial`s. It
            may also be None, and the function may capture arrays.
          *arguments: arrays, or shapes and dtypes, with which it will be called.

        Returns:
          `pure` with `pure(captures.arrays, *arguments) == function(holder, *arguments)`, also
          where more arrays were captured since.

        Example:
          >>> captures, scale = Captures(), jnp.arange(3.0)
          >>> pure = captures.hoist(lambda bias, x: x * scale + bias, jnp.ones(()), jnp.ones(3))
          >>> pure([array + 1 for array in captures.arrays], jnp.ones(3))
          Array([3., 4., 5.], dtype=float32)
        """
        leaves, structure = jax.tree.flatten(holder)
        held = [self._as_array(leaf) for leaf in leaves]

        def of_held(held: list[Array], *arguments: Any) -> Any:
            return function(jax.tree.unflatten(structure, held), *arguments)

        while True:
            shapes = self._shapes((held, *arguments))
            closed, made = jax.make_jaxpr(of_held, return_shape=True)(*shapes)
            consts = [self._as_array(const) for const in closed.consts]
            names = self.names.union(*map(compat.varying, consts))
            if names == self.names:
                break
            self.names = names  # traced again, as differing over these

        on_mesh = bool(self.names) or self.mesh is not None

        def rebound(consts: list[Array], held: list[Array], *arguments: Any) -> Any:
            leaves = jax.tree.leaves((held, arguments))
            if not on_mesh:
                return compat.jaxpr_as_fun(compat.ClosedJaxpr(closed.jaxpr, consts))(*leaves)
            return compat.evaluate(closed, consts, leaves) if consts else of_held(held, *arguments)

        # Traced a second time: the first jaxpr refers to the tracers that were captured, and would
        # keep them alive
        def trace(*shapes: Any) -> Any:
            return jax.make_jaxpr(rebound)(*shapes)

        retrace = compat.on_automatic_axes(trace, self.mesh, self.manual)
        pure = retrace(self._shapes(consts), *shapes)
        places = tuple(self._place(array) for array in (*consts, *held))
        return Pure(pure, places, jax.tree.structure(made))

    def _shapes(self, arrays: Any) -> Any:
        return jax.tree.map(lambda array: compat.shape_of(array, self.names), arrays)

    def _as_array(self, given: Any) -> Array:
        """Convert to a JAX array: the same one each time for the same object."""
        for earlier, array in self._given:
            if earlier is given:
                return array
        array = jnp.asarray(given)
        # Of a NumPy array JAX may return one that it made earlier, with 64 bits enabled
        if isinstance(given, np.ndarray):
            array = array.astype(jax.dtypes.canonicalize_dtype(given.dtype))
        self._given.append((given, array))
        return array

    def _place(self, array: Array) -> int:
        for place, earlier in enumerate(self.arrays):
            if earlier is array:
                return place
        self.arrays.append(array)
        return len(self.arrays) - 1
