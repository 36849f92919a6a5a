"""What a tensor that does not fit may be: another's name misspelt, or another layout."""

import difflib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

Shape = tuple[int, ...]
_MOST = 3  # suggestions of a kind: more would hide what is wrong
_NAMES, _LENGTH = 200, 200  # of which each is compared with each


def names_that_are_near(
    wanted: Mapping[str, Shape | None], unused: Mapping[str, Shape]
) -> list[str]:
    """For missing tensors those unused ones whose name is near, or which alone have the shape.

    Numbers in names are those of layers: names whose numbers differ are not near.

    Args:
      wanted: names of missing tensors, and their shapes, where known.
      unused: names and shapes of tensors that nothing takes.

    Example:
      >>> names_that_are_near({"fc.weight": (5, 3)}, {"fc.weigth": (5, 3), "norm.weight": (7,)})
      ['fc.weigth is the missing fc.weight: the names are near']
    """
    left = dict(itertools.islice(unused.items(), _NAMES))
    all_wanted, all_left = Counter(wanted.values()), Counter(unused.values())
    found = []
    for name, shape in itertools.islice(wanted.items(), _NAMES):
        alike = [other for other in left if _alike(name, shape, other, left[other])]
        near, why = difflib.get_close_matches(name, alike, n=1, cutoff=0.7), "the names are near"
        if not near and shape and all_wanted[shape] == all_left[shape] == 1:
            near = [other for other in left if left[other] == shape]
            why = f"no other has its shape {shape}"
        if near:
            del left[near[0]]
            found.append(f"{near[0]} is the missing {name}: {why}")
        if len(found) == _MOST:
            break
    return found


def _alike(name: str, shape: Shape | None, other: str, other_shape: Shape) -> bool:
    fits = shape is None or sorted(shape) == sorted(other_shape)
    numbers = [re.findall(r"\d+", each) for each in (name, other)]
    return fits and max(len(name), len(other)) <= _LENGTH and numbers[0] == numbers[1]


def shapes_that_would_fit(misfits: Iterable[tuple[str, Shape, Shape]]) -> list[str]:
    """For misshapen tensors the change after which they fit.

    Args:
      misfits: name, shape, and the shape that is needed.

    Example:
      >>> shapes_that_would_fit([("fc.weight", (48, 16), (16, 48)), ("qkv", (144, 48), (48, 48))])
      ['fc.weight: (48, 16) would fit transposed', 'qkv: (144, 48) is three parts of (48, 48)']
      >>> shapes_that_would_fit([("out.weight", (48, 48), (48, 6, 8)), ("fc.bias", (5,), (7,))])
      ['out.weight: (48, 48) would fit reshaped to (48, 6, 8)']
    """
    misfits = list(misfits)
    few = len(misfits) <= _MOST  # where all sizes are others, multiples are chance
    said = [(name, _change(got, needed, parts=few)) for name, got, needed in misfits]
    return [f"{name}: {change}" for name, change in said if change][:_MOST]


def _change(got: Shape, needed: Shape, *, parts: bool) -> str:
    """What makes one shape of another; empty: nothing that is known."""
    if got == needed:
        return ""
    if len(got) == len(needed) == 2 and got == needed[::-1]:
        return f"{got} would fit transposed"
    if len(got) <= 4 and sorted(got) == sorted(needed):
        orders = itertools.permutations(range(len(got)))
        order = next(each for each in orders if tuple(got[axis] for axis in each) == needed)
        return f"{got} would fit with its axes in the order {order}"
    if parts and (number := _times(got, needed)):
        return f"{got} is {number} parts of {needed}"
    if parts and (number := _times(needed, got)):
        return f"{got} is one of {number} parts of {needed}"
    if math.prod(got) == math.prod(needed):
        return f"{got} would fit reshaped to {needed}"
    return ""


def _times(whole: Shape, part: Shape) -> str:
    """How many parts along one axis make the whole: as many as projections or gates are packed."""
    if len(whole) != len(part):
        return ""
    differing = [(one, other) for one, other in zip(whole, part, strict=True) if one != other]
    if len(differing) != 1 or not differing[0][1] or differing[0][0] % differing[0][1]:
        return ""
    return {2: "two", 3: "three", 4: "four"}.get(differing[0][0] // differing[0][1], "")
