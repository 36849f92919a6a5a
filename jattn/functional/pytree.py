"""Values that JAX can look into: masks, modifiers, requests, states of a step."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.export
import yaml

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and a pytree: Python values are static, arrays are leaves.

    Example:
      >>> @pytree
      ... class Scale:
      ...     factor: object
      >>> jax.tree.leaves(Scale(2)), jax.tree.leaves(Scale(jax.numpy.arange(2)))
      ([], [Array([0, 1], dtype=int32)])
    """
    made = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]

    def flatten(value: T) -> Any:
        fields = {name: getattr(value, name) for name in names}
        static = {name: field for name, field in fields.items() if _is_static(field)}
        leaves = [field for name, field in fields.items() if name not in static]
        return leaves, (tuple(static.items()), tuple(name for name in names if name not in static))

    def unflatten(treedef: Any, leaves: Any) -> T:
        value = object.__new__(made)
        for name, field in (*treedef[0], *zip(treedef[1], leaves, strict=True)):
            object.__setattr__(value, name, field)
        return value

    jax.tree_util.register_pytree_node(made, flatten, unflatten)
    # `nnx.tabulate` writes the arguments of a call as YAML, but only arrays as words of its own
    yaml.SafeDumper.add_multi_representer(made, _represent)
    return made


def _represent(dumper: Any, value: Any) -> Any:
    return dumper.represent_str(repr(value))


def _is_static(field: Any) -> bool:
    if field is None or isinstance(field, (bool, int, float, str)):
        return True
    return callable(field) and jax.tree_util.all_leaves([field])


def named_tuple(cls: type[T]) -> type[T]:
    """Let a `NamedTuple` go where a plain tuple of arrays goes.

    `jax.export` serialises it. `nnx.tabulate`, which takes the keys of all tuples to be integers,
    shows it.

    Example:
      >>> from typing import NamedTuple
      >>> @named_tuple
      ... class Pair(NamedTuple):
      ...     first: object
      ...     second: object
      >>> jax.tree.map(lambda leaf: leaf + 1, Pair(1, 2))
      Pair(first=2, second=3)
    """
    made: Any = cls

    def flatten_with_keys(value: Any) -> Any:
        return [(jax.tree_util.SequenceKey(n), leaf) for n, leaf in enumerate(value)], None

    jax.tree_util.register_pytree_with_keys(
        made, flatten_with_keys, lambda _, leaves: made(*leaves)
    )
    jax.export.register_pytree_node_serialization(
        made,
        serialized_name=f"{made.__module__}.{made.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: None,
    )
    return cls
