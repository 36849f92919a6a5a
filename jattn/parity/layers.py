"""A Flax module as the calls of its layers, each of which can be repeated with other inputs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Arrays = Sequence[Any]
Weights = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer.

    Args:
      path: dotted, of the layer in its module.
      layer: a module of Flax NNX.
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
        return [leaf for leaf in jax.tree.leaves(self._given()) if _is_array(leaf)]

    @property
    def outputs(self) -> list[Any]:
        """The arrays of its output."""
        return [leaf for leaf in jax.tree.leaves(self.output) if _is_array(leaf)]

    @property
    def weights(self) -> dict[str, Any]:
        """The layer's parameters by their dotted paths within it."""
        state = nnx.to_flat_state(nnx.state(self.layer, nnx.Param))
        return {".".join(map(str, path)): variable[...] for path, variable in state}

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
            (path, variable.replace(weights[".".join(map(str, path))])) for path, variable in flat
        )
        layer = nnx.merge(graph, filled, jax.tree.map(jnp.asarray, rest))
        if evaluate:
            layer.eval()
        output = layer(*arguments, **options)
        return [leaf for leaf in jax.tree.leaves(output) if _is_array(leaf)]

    def _given(self) -> tuple[Any, Any]:
        return self.arguments, dict(self.options)


def split(module: nnx.Module) -> Any:
    """Structure, parameters and all other state of a module."""
    return nnx.split(module, nnx.Param, ...)


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
                sizes[label] = [jnp.zeros_like(leaf) for leaf in leaves if _is_float(leaf)]
                return output
            new = iter(zeros.get(label, ()))
            moved = [leaf + next(new) if _is_float(leaf) else leaf for leaf in leaves]
            return jax.tree.unflatten(structure, moved)

        return call(_watched(module, note))

    moved(None)
    _, pull_back = jax.vjp(moved, dict(sizes))
    return pull_back(cotangents)[0]


def _is_float(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _watched(module: nnx.Module, note: Callable[..., Any]) -> nnx.Module:
    """A copy whose layers, when they are called, tell what they got and gave."""
    originals = {
        ".".join(map(str, path)): layer for path, layer in nnx.iter_modules(module) if path
    }
    copy = nnx.clone(module)
    for path, layer in nnx.iter_modules(copy):
        name = ".".join(map(str, path))
        if name in originals and callable(layer):
            told = functools.partial(note, name, originals[name])
            layer.__class__ = _telling(type(layer), told)
    return copy


def _telling(kind: type, told: Callable[..., Any]) -> Any:
    def __call__(self: Any, *arguments: Any, **options: Any) -> Any:
        return told(arguments, options, kind.__call__(self, *arguments, **options))

    names = {"__call__": __call__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)
