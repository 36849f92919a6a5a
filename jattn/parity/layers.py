"""A Flax module as the calls of its layers, each of which can be repeated with other inputs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.parity.adapters import Linen

Arrays = Sequence[Any]
Weights = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer.

    Args:
      path: dotted, of the layer in its module.
      layer: a module of Flax NNX, or one of Linen, seen as such.
      arguments, options: what it was called with.
      output: what it returned, a pytree.
    """

    path: str
    layer: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    output: Any

    @property
    def arrays(self) -> list[Any]:
        """The arrays among its arguments and options."""
        return arrays_of(self._given())

    @property
    def outputs(self) -> list[Any]:
        """The arrays of its output."""
        return arrays_of(self.output)

    @property
    def weights(self) -> dict[str, Any]:
        """The layer's parameters by their dotted paths within it."""
        state = nnx.to_flat_state(nnx.state(self.layer, nnx.Param))
        return {dotted(path): variable[...] for path, variable in state}

    def again(self, weights: Weights, arrays: Arrays, *, evaluate: bool = False) -> list[Any]:
        """The arrays that the layer returns for other weights and arrays: a pure function.

        Args:
          weights, arrays: instead of those of the call.
          evaluate: whether to switch dropout off.
        """
        given, structure = jax.tree.flatten(self._given())
        new = iter(arrays)
        given = [next(new) if _is_array(leaf) else leaf for leaf in given]
        arguments, options = jax.tree.unflatten(structure, given)
        graph, parameters, rest = split(self.layer)
        flat = nnx.to_flat_state(parameters)
        filled = nnx.from_flat_state(
            (path, variable.replace(weights[dotted(path)])) for path, variable in flat
        )
        layer = nnx.merge(graph, filled, jax.tree.map(jnp.asarray, rest))
        if evaluate:  # no more than this: a batch norm stays in its mode
            layer.set_attributes(deterministic=True, raise_if_not_found=False)
        return arrays_of(layer(*arguments, **options))

    def _given(self) -> tuple[Any, Any]:
        return self.arguments, dict(self.options)


def split(module: nnx.Module) -> Any:
    """Structure, parameters and all other state of a module."""
    return nnx.split(module, nnx.Param, ...)


def dotted(path: Sequence[Any]) -> str:
    """A path in a module, as rules write it.

    Example:
      >>> dotted(("blocks", 0, "norm"))
      'blocks.0.norm'
    """
    return ".".join(map(str, path))


def arrays_of(tree: Any) -> list[Any]:
    """The arrays among the leaves of a pytree."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]


def is_float(array: Any) -> bool:
    """Whether it holds floating-point numbers, of whatever width."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def calls(module: nnx.Module, call: Callable[[nnx.Module], Any]) -> tuple[Any, list[Call]]:
    """What a function of a module gives, and the calls of the module's layers, as they end.

    Calls under a transformation of JAX, such as those in a scan, are left out.

    Args:
      module: of Flax NNX.
      call: of the module; it gets a copy.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.tanh)
      >>> output, found = calls(model, lambda model: model(jnp.ones(2)))
      >>> [(each.path, each.outputs[0].shape) for each in found]
      [('layers.0', (3,))]
    """
    found: list[Call] = []

    def note(path: str, layer: Any, arguments: Any, options: Any, output: Any) -> Any:
        leaves = jax.tree.leaves((arguments, options, output))
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            found.append(Call(path, layer, arguments, options, output))
        return output

    return call(_watched(module, note)), found


def gradients(
    module: nnx.Module, call: Callable[[nnx.Module], Any], cotangents: Any
) -> dict[str, list[Any]]:
    """Gradients with respect to each layer's outputs, by PATH[CALL]; of Σ ⟨cotangent, output⟩.

    Calls under a transformation of JAX are left out, as in `calls`.

    Args:
      module, call: as for `calls`.
      cotangents: of what the call gives, with its structure.
    """
    sizes: dict[str, list[Any]] = {}
    numbers: dict[str, int] = {}

    def moved(zeros: Mapping[str, Any] | None) -> Any:
        numbers.clear()

        def note(path: str, layer: Any, arguments: Any, options: Any, output: Any) -> Any:
            label = f"{path}[{numbers.get(path, 0)}]"
            numbers[path] = numbers.get(path, 0) + 1
            leaves, structure = jax.tree.flatten(output)
            if zeros is None:
                if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                    sizes[label] = [jnp.zeros_like(leaf) for leaf in leaves if _moves(leaf)]
                return output
            if label not in zeros:
                return output
            new = iter(zeros[label])
            moved = [leaf + next(new) if _moves(leaf) else leaf for leaf in leaves]
            return jax.tree.unflatten(structure, moved)

        return call(_watched(module, note))

    moved(None)
    _, pull_back = jax.vjp(moved, dict(sizes))
    return pull_back(cotangents)[0]


def _moves(leaf: Any) -> bool:
    return _is_array(leaf) and is_float(leaf)


def _watched(module: nnx.Module, note: Callable[..., Any]) -> nnx.Module:
    """A copy whose layers, when they are called, tell what they got and gave."""
    originals = {dotted(path): layer for path, layer in nnx.iter_modules(module) if path}
    copy = nnx.clone(module)
    if isinstance(copy, Linen):
        copy.tell(note)
    for path, layer in nnx.iter_modules(copy):
        name = dotted(path)
        if name in originals and callable(layer):
            told = functools.partial(note, name, originals[name])
            layer.__class__ = _telling(type(layer), told)
    return copy


def _telling(kind: type, told: Callable[..., Any]) -> Any:
    def __call__(self: Any, *arguments: Any, **options: Any) -> Any:
        return told(arguments, options, kind.__call__(self, *arguments, **options))

    names = {"__call__": __call__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)
