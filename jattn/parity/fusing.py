"""Weights that are one tensor here and several there: of query, key and value, or of all layers."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from jattn.interop.rules import Rearrange, Rule
from jattn.parity.layers import dotted
from jattn.parity.names import alike, plain, role

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def open_shapes(module: nnx.Module, rules: Iterable[Rule]) -> dict[str, Shape]:
    """The shapes of the parameters, by path, that no rule fills."""
    rules = list(rules)
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    shapes = {dotted(path): tuple(variable.shape) for path, variable in flat}
    return {path: shape for path, shape in shapes.items() if not any(r.fills(path) for r in rules)}


def fused(tensors: Mapping[str, Any], module: nnx.Module, rules: Iterable[Rule]) -> list[Rule]:
    """Rules for what no other rule takes: tensors that are side by side on either side, or stacked.

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
    sides = [
        (names, (path,), _side_by_side(theirs[names[0]], len(names), ours[path], path))
        for names in _siblings(theirs)
        for path in ours
    ] + [
        ((name,), paths, _taken_apart(theirs[name], len(paths), ours[paths[0]], paths[0]))
        for paths in _siblings(ours)
        for name in theirs
    ]
    fitting = [side for side in sides if side[-1]]
    fitting.sort(key=_unlike)
    found: list[Rule] = []
    for names, paths, layout in fitting:
        if theirs.keys() >= {*names} and ours.keys() >= {*paths}:
            parts = {"parts": max(len(names), len(paths))}
            found.append(Rule(names, paths, Rearrange(str(layout), parts)))
            theirs = {name: shape for name, shape in theirs.items() if name not in names}
            ours = {path: shape for path, shape in ours.items() if path not in paths}
    return found


def _unlike(side: tuple[Sequence[str], Sequence[str], Any]) -> float:
    """How little the least fitting names of both sides are alike."""
    return -min(alike(plain(name), plain(path)) for name in side[0] for path in side[1])


def _siblings(shapes: Shapes) -> list[tuple[str, ...]]:
    """Names of one shape that differ in one part: the one before the last, or a number."""
    words: dict[Any, list[str]] = defaultdict(list)
    numbers: dict[Any, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        *parents, _, leaf = ["", "", *name.split(".")]
        words[*parents, leaf, shape].append(name)
        if (other := re.sub(r"(^|\.)\d+\.", r"\1*.", name, count=1)) != name:
            numbers[other, shape].append(name)
    few = [_ordered(names) for names in words.values() if len(names) in (2, 3)]
    return few + [tuple(names) for names in numbers.values() if len(names) > 1]


def _ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Query, key, value, where the names tell; else as they come."""
    roles = {name: role(["", *name.split(".")][-2]) for name in names}
    known = len({*roles.values()} - {None}) == len(names)
    return tuple(sorted(names, key=lambda name: roles[name] or 0) if known else names)


def _side_by_side(part: Shape, count: int, whole: Shape, path: str) -> str | None:
    """The layout of tensors that make up one parameter, one behind the other or stacked."""
    if len(part) == 2:
        o, i = part
        turned = [((i, count * o), "parts o i -> i (parts o)"),
                  ((count, i, o), "parts o i -> parts i o")]  # fmt: skip
        as_it_is = [((count * o, i), "parts o i -> (parts o) i"),
                    ((count, o, i), "parts o i -> parts o i")]  # fmt: skip
        # Of one that is square its name tells
        known = turned + as_it_is if path.endswith("kernel") else as_it_is + turned
        return next((layout for shape, layout in known if shape == whole), None)
    if len(part) == 1 and whole == (count * part[0],):
        return "parts o -> (parts o)"
    return "parts o -> parts o" if whole == (count, *part) and len(part) == 1 else None


def _taken_apart(whole: Shape, count: int, part: Shape, path: str) -> str | None:
    """The layout of a tensor that is several parameters; one that is square tells by its name."""
    if len(part) == 1:
        return "(parts o) -> parts o" if whole == (count * part[0],) else None
    if len(part) != 2:
        return None
    i, o = part
    if whole == (i, count * o):  # GPT-2's lie as in Flax
        return "i (parts o) -> parts i o"
    known = [
        ((count * o, i), "(parts o) i -> parts i o"),
        ((count * i, o), "(parts o) i -> parts o i"),
    ]
    order = known if path.endswith("kernel") else known[::-1]
    return next((layout for shape, layout in order if shape == whole), None)
