"""Weights that are one tensor here and several there, such as those of query, key and value."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from jattn.interop.rules import Rearrange, Rule
from jattn.parity.layers import dotted

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
ROLES = ({"q", "wq", "query"}, {"k", "wk", "key"}, {"v", "wv", "value"})


def open_shapes(module: nnx.Module, rules: Iterable[Rule]) -> dict[str, Shape]:
    """The shapes of the parameters, by path, that no rule fills."""
    rules = list(rules)
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    shapes = {dotted(path): tuple(variable.shape) for path, variable in flat}
    return {path: shape for path, shape in shapes.items() if not any(r.fills(path) for r in rules)}


def fused(tensors: Mapping[str, Any], module: nnx.Module, rules: Iterable[Rule]) -> list[Rule]:
    """Rules for what no other rule takes: two or three tensors side by side, on either side.

    Query comes before key, and key before value, where the names tell.

    Args:
      tensors: of PyTorch.
      module: of Flax NNX.
      rules: that there are already.
    """
    rules = list(rules)
    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not any(rule.takes(name) for rule in rules)
    }
    ours = open_shapes(module, rules)
    found: list[Rule] = []
    for names in _siblings(theirs):
        for path, shape in ours.items():
            if pattern := _side_by_side(theirs[names[0]], len(names), shape):
                found.append(Rule(names, path, Rearrange(pattern, {"parts": len(names)})))
                del ours[path]
                break
    for paths in _siblings(ours):
        for name, shape in theirs.items():
            if pattern := _taken_apart(shape, len(paths), ours[paths[0]], paths[0]):
                found.append(Rule(name, paths, Rearrange(pattern, {"parts": len(paths)})))
                del theirs[name]
                break
    return found


def _siblings(shapes: Shapes) -> list[tuple[str, ...]]:
    """Two or three names that differ in the part before the last alone, of one shape."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        *parents, _, leaf = ["", "", *name.split(".")]
        groups[*parents, leaf, shape].append(name)
    return [_ordered(names) for names in groups.values() if len(names) in (2, 3)]


def _ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Query, key, value, where the names tell; else as they come."""
    roles = {name: role(["", *name.split(".")][-2]) for name in names}
    known = len({*roles.values()} - {None}) == len(names)
    return tuple(sorted(names, key=lambda name: roles[name] or 0) if known else names)


def role(name: str) -> int | None:
    """Which of query, key and value a layer's name means.

    Example:
      >>> [role(name) for name in ("to_q", "W_k", "value", "dense")]
      [0, 1, 2, None]
    """
    words = {*re.findall("[a-z]+", name.lower())}
    return next((number for number, known in enumerate(ROLES) if words & known), None)


def _side_by_side(part: Shape, count: int, whole: Shape) -> str | None:
    """The layout of tensors that make up one parameter."""
    if len(part) == 1:
        return "parts o -> (parts o)" if whole == (count * part[0],) else None
    if len(part) != 2:
        return None
    if whole == (part[1], count * part[0]):
        return "parts o i -> i (parts o)"
    return "parts o i -> (parts o) i" if whole == (count * part[0], part[1]) else None


def _taken_apart(whole: Shape, count: int, part: Shape, path: str) -> str | None:
    """The layout of a tensor that is several parameters; one that is square tells by its name."""
    if len(part) == 1:
        return "(parts o) -> parts o" if whole == (count * part[0],) else None
    if len(part) != 2:
        return None
    is_square = len({*part}) == 1
    if whole == (count * part[1], part[0]) and (path.endswith("kernel") or not is_square):
        return "(parts o) i -> parts i o"
    return "(parts o) i -> parts o i" if whole == (count * part[0], part[1]) else None
