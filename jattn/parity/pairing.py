"""Which layer of a PyTorch module is which of a Flax module, and the rules of their weights.

Guessed from names, shapes and the order of calls; shown, and to be written down by the user.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from jattn.interop.convert import TABLES
from jattn.interop.errors import ConversionError
from jattn.interop.rules import IDENTITY, Rearrange, Rule, to_flax, within
from jattn.parity.adapters import kind_of
from jattn.parity.fixtures import Fixture
from jattn.parity.fusing import fused, open_shapes
from jattn.parity.layers import Call, dotted
from jattn.parity.names import alike, plain, role

Pairs = Mapping[str, str]
CONVOLUTION = Rearrange("o i ... -> ... i o")  # and a Linear
NEARLY = 1.6  # of 2, which is the same name


def guess_pairs(fixture: Fixture, calls: Sequence[Call]) -> dict[str, str]:
    """PyTorch's layers, by name, and the Flax layers, by path, that have as many weights.

    Of those with the same number of weights, and outputs of the same size, the names decide where
    they are the same; else the first called is taken for the first called; where their numbers
    differ, the likeness of the names decides. Of those that are
    left, where a bias is missing, say, nearly the same names are a pair.

    Args:
      fixture: what PyTorch's module did.
      calls: of the Flax module's layers.

    Example:
      >>> weights = {"fc.weight": np.zeros((2, 3)), "fc.bias": np.zeros(2)}
      >>> outputs = {"fc[0]": np.zeros((5, 2))}
      >>> fixture = Fixture("yours/net", "net", parameters=weights, modules=outputs)
      >>> linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> guess_pairs(fixture, [Call("out", linear, (), {}, np.zeros((5, 2)))])
      {'fc': 'out'}
    """
    theirs: dict[Any, list[str]] = defaultdict(list)
    for name, output in first_outputs(fixture.modules).items():
        size = sum(array.size for array in _of(fixture.parameters, name).values())
        theirs[size, output.size].append(name)
    ours: dict[Any, list[str]] = defaultdict(list)
    for call in calls:
        size = sum(np.size(array) for array in call.weights.values())
        key = size, np.size(call.outputs[0]) if call.outputs else 0
        if call.path not in ours[key]:
            ours[key].append(call.path)
    pairs: dict[str, str] = {}
    for key, names in theirs.items():
        if key[0]:
            pairs |= _matched(names, ours.get(key, []))
    pairs |= _namesakes(theirs, ours, pairs)
    order = list(first_outputs(fixture.modules))
    return {name: pairs[name] for name in order if name in pairs}


def with_given(guessed: Pairs, given: Pairs, fixture: Fixture) -> dict[str, str]:
    """The pairs that are given, and those guessed ones that do not contradict them.

    Raises:
      ValueError: PyTorch's module has no such layer.
    """
    known = first_outputs(fixture.modules)
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"pairs: PyTorch's module has no layer {', '.join(map(repr, unknown))}")
    kept = {name: path for name, path in guessed.items() if path not in given.values()}
    return {**kept, **given}


def _namesakes(
    theirs: Mapping[Any, Sequence[str]], ours: Mapping[Any, Sequence[str]], pairs: Pairs
) -> dict[str, str]:
    """Layers of nearly the same name and the same size of output, of which one lacks a weight."""
    found: dict[str, str] = {}
    for (weights, size), names in theirs.items():
        paths = [
            path for (number, other), each in ours.items() if number and other == size
            for path in each
        ]  # fmt: skip
        for name in names if weights else ():
            left = [path for path in paths if path not in (*pairs.values(), *found.values())]
            best = max(left, key=lambda path: alike(name, path), default=None)
            if name not in pairs and best is not None and alike(name, best) > NEARLY:
                found[name] = best
    return found


def first_outputs(modules: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first output of the first call of each layer, by its name, in the order of the ends."""
    found: dict[str, np.ndarray] = {}
    for label, array in modules.items():
        found.setdefault(layer_of(label), array)
    return found


def layer_of(label: str) -> str:
    """The name of the layer of a label such as `NAME[CALL]` or `NAME[CALL][ITEM]`.

    Example:
      >>> layer_of("layers.0.attention[1][0]")
      'layers.0.attention'
    """
    return label.partition("[")[0]


def _of(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of a layer, under their names within it."""
    prefix = f"{name}." if name else ""
    return {
        key.removeprefix(prefix): array
        for key, array in parameters.items()
        if key.startswith(prefix)
    }


def _matched(names: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    # A layer and one that holds nothing else have the same weights; the inner one is the layer
    for one, other in itertools.product((names, _inner(names)), (paths, _inner(paths))):
        if sorted(map(_own, one)) == sorted(map(_own, other)):
            return dict(zip(sorted(one, key=_own), sorted(other, key=_own), strict=True))
        if len(one) == len(other):
            return dict(zip(_by_role(one), _by_role(other), strict=True))
    likeness = sorted(
        (
            (alike(name, path), -i, -j)
            for i, name in enumerate(names)
            for j, path in enumerate(paths)
        ),
        reverse=True,
    )
    found: dict[str, str] = {}
    for _, i, j in likeness:
        if names[-i] not in found and paths[-j] not in found.values():
            found[names[-i]] = paths[-j]
    return found


def _own(name: str) -> str:
    """The name of a layer within the one that holds it."""
    return name.rpartition(".")[2]


def _inner(names: Sequence[str]) -> list[str]:
    return [
        name for name in names if not any(each.startswith(f"{name}.") for each in names)
    ]  # fmt: skip


def _by_role(names: Sequence[str]) -> list[str]:
    """The names in their order, but query before key before value of one parent."""
    siblings: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if role(_own(name)) is not None:
            siblings[name.rpartition(".")[0]].append(name)
    ordered = {
        name: other
        for each in siblings.values()
        for name, other in zip(
            each, sorted(each, key=lambda name: role(_own(name)) or 0), strict=True
        )
    }
    return [ordered.get(name, name) for name in names]


def guess_rules(
    fixture: Fixture, module: nnx.Module, pairs: Pairs, calls: Sequence[Call] = (),
    given: Iterable[Rule] = (),
) -> tuple[Rule, ...]:  # fmt: skip
    """The rules of the weights of paired layers; what is left is paired by names and shapes.

    Args:
      fixture: what PyTorch's module did.
      module: of Flax NNX.
      pairs: PyTorch's layers → the module's.
      calls: of its layers; those of Linen are known by them.
      given: rules that are known; only what they do not take is guessed.

    Raises:
      ValueError: a pair names a layer that there is not.
    """
    layers = {dotted(path): layer for path, layer in nnx.iter_modules(module)}
    layers |= {call.path: call.layer for call in calls} | {"": module}
    if unknown := [path for path in pairs.values() if path not in layers]:
        raise ValueError(f"pairs: the port has no layer {', '.join(map(repr, unknown))}")
    rules = list(given)
    taken = {name for name in fixture.parameters if any(rule.takes(name) for rule in rules)}
    whole = [("", ""), *sorted(pairs.items(), key=lambda pair: pair[0].count("."))]
    for name, path in whole:
        own = _of(fixture.parameters, name)
        names = {f"{name}.{key}" if name else key for key in own}
        if not names & taken and (table := _table(layers[path], own)):
            used = [rule for rule in table.rules if any(rule.takes(key) for key in own)]
            rules += within(used, name, path)
            taken |= names
    rules += _by_shape(fixture.parameters, module, rules)
    return (*rules, *fused(fixture.parameters, module, rules))


def _table(layer: nnx.Module, tensors: Mapping[str, np.ndarray]) -> Any:
    """The table of a layer's class that knows all of the names, and fits."""
    for base in kind_of(layer).__mro__:
        for table in TABLES.get(base, ()):
            if tensors and table.knows(tensors) == len(tensors):
                try:
                    to_flax(tensors, layer, table.rules)
                except ConversionError:
                    continue
                return table
    return None


def _by_shape(
    tensors: Mapping[str, np.ndarray], module: nnx.Module, rules: Sequence[Rule]
) -> list[Rule]:
    """Rules for what no other rule takes: the same shape, or that of a transposed matrix."""
    theirs = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if not any(rule.takes(name) for rule in rules)
    }
    ours = open_shapes(module, rules)
    fitting = [
        (alike(plain(name), plain(path)), -i, -j, name, path)
        for i, (name, shape) in enumerate(theirs.items())
        for j, path in enumerate(ours)
        if ours[path] in (shape, _turned(shape))
    ]
    found: dict[str, Rule] = {}
    filled: set[str] = set()
    for *_, name, path in sorted(fitting, reverse=True):
        if name in found or path in filled:
            continue
        shape, turned = theirs[name], _turned(theirs[name])
        is_kernel = len(shape) > 1 and path.endswith("kernel") and ours[path] == turned
        turn = is_kernel or ours[path] != shape
        found[name] = Rule(name, path, CONVOLUTION if turn else IDENTITY)
        filled.add(path)
    return list(found.values())


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that Flax gives the weight of a Linear or a convolution."""
    return (*shape[2:], *shape[1::-1])
