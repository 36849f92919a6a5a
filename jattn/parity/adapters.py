"""Ports that are no modules of Flax NNX, seen as such: functions with parameters, Linen modules."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.errors import FlaxError

Note = Callable[..., Any]  # (path, layer, arguments, options, output) -> output
KINDS: Mapping[type, type[nnx.Module]] = MappingProxyType(
    {
        linen.Dense: nnx.Linear,
        linen.Embed: nnx.Embed,
        linen.LayerNorm: nnx.LayerNorm,
        linen.RMSNorm: nnx.RMSNorm,
        linen.MultiHeadDotProductAttention: nnx.MultiHeadAttention,
        linen.MultiHeadAttention: nnx.MultiHeadAttention,
    }
)
"""Classes of Linen whose parameters have the paths and shapes of one of NNX."""


class Parameters(nnx.Module):
    """Nested parameters as nested modules.

    Example:
      >>> import numpy as np
      >>> [path for path, _ in nnx.to_flat_state(nnx.state(Parameters({"a": {"b": np.ones(2)}})))]
      [('a', 'b')]
    """

    def __init__(self, tree: Mapping[str, Any]):
        for name, value in tree.items():
            leaf = Parameters(value) if isinstance(value, dict) else nnx.Param(jnp.asarray(value))
            setattr(self, name, leaf)


class Function(Parameters):
    """A function as a module; of its parameters, if there are any, and arrays.

    Args:
      function: `(params, *arrays)`, or `(*arrays)` where params is None.
      params: a pytree of dicts, lists and arrays.

    Example:
      >>> import numpy as np
      >>> module = Function(lambda w, x: w["scale"] * x, {"scale": np.float32(3)})
      >>> float(module(2.0))
      6.0
    """

    # Names with an underscore, for the parameters are attributes, too
    def __init__(self, function: Callable[..., Any], params: Any = None):
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        self._function, self._structure, self._takes = function, structure, params is not None
        self._paths = tuple(tuple(str(_key(each)) for each in path) for path, _ in leaves)
        super().__init__(_nested(self._paths, [leaf for _, leaf in leaves]))

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """What the function gives, with the parameters before the arrays."""
        return self._function(*self._params(), *arrays, **options)

    def _params(self) -> tuple[Any, ...]:
        """The parameters, in their own form, as the first argument; or none."""
        if not self._takes:
            return ()
        state = dict(nnx.to_flat_state(nnx.state(self, nnx.Param)))
        leaves = [state[path][...] for path in self._paths]
        return (jax.tree.unflatten(self._structure, leaves),)


class Linen(Function):
    """A module of Linen with its variables, of which the parameters are those of the module.

    Args:
      module: not bound.
      variables: of it.
    """

    def __init__(self, module: linen.Module, variables: Mapping[str, Any]):
        others = {name: each for name, each in variables.items() if name != "params"}
        super().__init__(functools.partial(_apply, module, others), variables.get("params", {}))
        self._kind = _kind(module)
        self.deterministic = False
        self._note: Note | None = None

    def tell(self, note: Note) -> None:
        """Let calls tell of each layer, as it ends: `(path, layer, arguments, options, output)`."""
        self._note = note

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """What the module gives."""
        with linen.intercept_methods(self._of_layer):
            return self._function(*self._params(), *arrays, **options)

    def _of_layer(self, call: Any, arguments: Any, options: Any, context: Any) -> Any:
        """What a layer within gives; dropout may be off, and the layer's call is noted."""
        layer = context.module
        is_off = self.deterministic and isinstance(layer, linen.Dropout)
        output = [*arguments, *options.values()][0] if is_off else call(*arguments, **options)
        if self._note is None or context.method_name != "__call__" or not layer.path:
            return output
        module, variables = layer.unbind()
        inner = Linen(module, linen.meta.unbox(variables))
        return self._note(".".join(layer.path), inner, arguments, options, output)


def _apply(
    module: linen.Module, others: Mapping[str, Any], params: Any, *arrays: Any, **options: Any
) -> Any:
    streams = {"dropout": jax.random.key(0)}
    return module.apply({**others, "params": params}, *arrays, rngs=streams, **options)


def kind_of(layer: nnx.Module) -> type[Any]:
    """The class of NNX whose weights a layer has."""
    return layer._kind if isinstance(layer, Linen) else type(layer)


def _kind(module: linen.Module) -> Any:
    if isinstance(module, nnx.bridge.ToLinen):
        return module.nnx_class
    return next((KINDS[base] for base in type(module).__mro__ if base in KINDS), type(module))


def as_nnx(
    module: Any, params: Any, call: Callable[[Any, Mapping[str, Any]], Any],
    inputs: Mapping[str, Any],
) -> nnx.Module:  # fmt: skip
    """Any port as a module of NNX; one of Linen that has no variables yet gets them.

    Args:
      module: of NNX or Linen, bound or not, or a function.
      params: the first argument of the function, or the variables of the module of Linen.
      call, inputs: what the variables are made with.

    Raises:
      TypeError: it is none of these, or has its parameters already.
    """
    if isinstance(module, linen.Module):
        if module.scope is not None:
            module, params = module.unbind()
        if params is None:
            streams = {name: jax.random.key(0) for name in ("params", "dropout")}
            with callable_with(inputs):
                params = module.init(streams, method=lambda bound: call(bound, inputs))
        variables = params if "params" in params else {"params": params}
        return Linen(module, jax.tree.map(_wide, linen.meta.unbox(variables)))
    if isinstance(module, nnx.Module):
        if params is not None:
            raise TypeError("params are of a function or of Linen; a module of NNX has its own")
        return module
    if not callable(module):
        raise TypeError(f"expected a module of Flax or a function, got {type(module).__name__}")
    return Function(module, params)


def _wide(array: Any) -> Any:
    """Statistics and the like in float64, too."""
    is_float = jnp.issubdtype(jnp.result_type(array), jnp.floating)
    return jnp.asarray(array, jnp.float64) if is_float else array


@contextlib.contextmanager
def callable_with(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Say of a port that fails what it was called with."""
    try:
        yield
    except (TypeError, ValueError, FlaxError) as error:
        raise ValueError(
            f"the port cannot be called with the inputs {', '.join(inputs)}: {error}"
        ) from error


def _key(part: Any) -> Any:
    """The name of one step of a path in a pytree."""
    return next(getattr(part, name) for name in ("key", "idx", "name") if hasattr(part, name))


def _nested(paths: tuple[tuple[str, ...], ...], leaves: list[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree
