"""Frozen values that JAX can look into: masks, modifiers, requests."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

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
    return made


def _is_static(field: Any) -> bool:
    if field is None or isinstance(field, (bool, int, float, str)):
        return True
    return callable(field) and jax.tree_util.all_leaves([field])
