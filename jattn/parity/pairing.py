"""Which layer of a PyTorch module is which of a Flax module, and the rules of their weights.

Guessed from names, shapes and the order of calls; shown, and to be written down by the user.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from jattn.interop.convert import TABLES
from jattn.interop.rules import IDENTITY, TRANSPOSE, Rule, within
from jattn.parity.adapters import kind_of
from jattn.parity.fixtures import Fixture
from jattn.parity.layers import Call, dotted

Pairs = Mapping[str, str]
NEARLY = 1.6  # of 2, which is the same name


def guess_pairs(fixture: Fixture, calls: Sequence[Call]) -> dict[str, str]:
    """PyTorch's layers, by name, and the Flax layers, by path, that have as many weights.

    Of those with the same number of weights, and outputs of the same size, the first called is
    taken for the first called; where their numbers differ, the names decide. Of those that are
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
            best = max(left, key=lambda path: _alike(name, path), default=None)
            if name not in pairs and best is not None and _alike(name, best) > NEARLY:
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
    if len(names) == len(paths):
        return dict(zip(names, paths, strict=True))
    likeness = sorted(
        (
            (_alike(name, path), -i, -j)
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


def _alike(name: str, path: str) -> float:
    """How alike two names are, by words and numbers and by letters."""
    one, other = (re.findall(r"\d+|[a-z]+", each.lower()) for each in (name, path))
    return (
        difflib.SequenceMatcher(None, one, other).ratio()
        + difflib.SequenceMatcher(None, name, path).ratio()
    )


def guess_rules(
    fixture: Fixture, module: nnx.Module, pairs: Pairs, calls: Sequence[Call] = ()
) -> tuple[Rule, ...]:
    """The rules of the weights of paired layers; what is left is paired by names and shapes.

    Args:
      fixture: what PyTorch's module did.
      module: of Flax NNX.
      pairs: PyTorch's layers → the module's.
      calls: of its layers; those of Linen are known by them.

    Raises:
      ValueError: a pair names a layer that there is not.
    """
    kinds = {dotted(path): type(layer) for path, layer in nnx.iter_modules(module)}
    kinds |= {call.path: kind_of(call.layer) for call in calls}
    if unknown := [path for path in pairs.values() if path not in kinds]:
        raise ValueError(f"pairs: the port has no layer {', '.join(map(repr, unknown))}")
    rules: list[Rule] = []
    taken: set[str] = set()
    for name, path in sorted(pairs.items(), key=lambda pair: pair[0].count(".")):
        own = _of(fixture.parameters, name)
        left = {key for key in own if f"{name}.{key}" not in taken}
        table = _table(kinds[path], left)
        if table and left == set(own):
            used = [rule for rule in table.rules if any(rule.takes(key) for key in own)]
            rules += within(used, name, path)
            taken |= {f"{name}.{key}" for key in own}
    return (*rules, *_by_shape(fixture.parameters, module, rules))


def _table(kind: type[nnx.Module], names: Iterable[str]) -> Any:
    """The table of a class that knows all of the names."""
    names = list(names)
    for base in kind.__mro__:
        for table in TABLES.get(base, ()):
            if names and table.knows(names) == len(names):
                return table
    return None


def _by_shape(
    tensors: Mapping[str, np.ndarray], module: nnx.Module, rules: Sequence[Rule]
) -> list[Rule]:
    """Rules for what no other rule takes: the same shape, or that of a transposed matrix."""
    state = {
        dotted(path): variable for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    open_ = {
        path: variable.shape
        for path, variable in state.items()
        if not any(rule.fills(path) for rule in rules)
    }
    found = []
    for name, tensor in tensors.items():
        if any(rule.takes(name) for rule in rules):
            continue
        fitting = [path for path, shape in open_.items() if shape in (tensor.shape, tensor.T.shape)]
        if fitting:
            path = max(fitting, key=lambda path: _alike(name, path))
            is_kernel = tensor.ndim == 2 and path.endswith("kernel")
            turn = is_kernel or open_[path] != tensor.shape
            found.append(Rule(name, path, TRANSPOSE if turn else IDENTITY))
            del open_[path]
    return found
