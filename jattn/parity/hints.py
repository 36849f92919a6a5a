"""What would make a layer equal to PyTorch's: found by trying, never by guessing.

Each hint is a change of the layer, of its weights, its input or one of its equations, with which
the layer gives PyTorch's output for PyTorch's input.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.errors import FlaxError

from jattn.parity.layouts import largest_difference
from jattn.parity.program import Change, Program, Step

Arrays = Sequence[Any]
Weights = Mapping[str, Any]
EPSILONS = (1e-5, 1e-6, 1e-12, 1e-3, 1e-8, 1e-7)
ALLOWED = 1e-9  # of the largest number of a tensor
ROTARY = "matches if rotary positions are interleaved: pairs of neighbours for halves, or back"
NARROW = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float16"))
MOST_TRIALS = 60  # of one kind


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that differs, and what PyTorch's gives.

    Args:
      call: `(weights, arrays) -> arrays`, a pure function.
      weights: by name.
      arrays: PyTorch's inputs.
      expected: PyTorch's outputs; only those that are not None are compared.
      without_dropout: the same call with dropout off, or None.
    """

    call: Callable[[Weights, Arrays], Arrays]
    weights: Weights
    arrays: Arrays
    expected: Arrays
    without_dropout: Callable[[Weights, Arrays], Arrays] | None = None

    def fits(self, found: Arrays) -> bool:
        """Whether outputs are PyTorch's."""
        return len(found) >= len(self.expected) and all(
            one is None or _close(other, one)
            for one, other in zip(self.expected, found, strict=False)
        )


Trial = tuple[str, Callable[[], Arrays]]


def hints(layer: Layer) -> list[str]:
    """Every kind of change with which the layer is equal to PyTorch's, in words.

    Example:
      >>> x, w = np.arange(6.0).reshape(2, 3), np.arange(9.0).reshape(3, 3)
      >>> call = lambda weights, arrays: [arrays[0] @ weights["kernel"]]
      >>> hints(Layer(call, {"kernel": w}, [x], [x @ w.T]))
      ['matches if kernel is transposed']
    """
    # The layer is the user's own: it may mix types as JAX lets it
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        program = Program(layer.call, dict(layer.weights), list(layer.arrays))
        if layer.fits(program.results):  # its shapes alone differ
            return []
        if dropout := _first(layer, _dropout(layer)):
            return [dropout]
        kinds: list[Iterator[Trial]] = [
            _transposed(layer), _blocks(layer), _halves(layer), _inputs(layer),
            _gelu(program), _epsilon(program), _softmax(program), _heads(program),
            _masks(program), _scale(program), _precision(program),
        ]  # fmt: skip
        found = dict.fromkeys(hint for kind in kinds if (hint := _first(layer, kind)))
        return list(found) or _bias(layer, program.results)


def _first(layer: Layer, trials: Iterator[Trial]) -> str | None:
    """The words of the first trial that fits."""
    for words, outputs in itertools.islice(trials, MOST_TRIALS):
        try:
            if layer.fits(outputs()):
                return words
        except (TypeError, ValueError, FlaxError):  # shapes that a change makes unfit
            continue
    return None


def _close(found: Any, expected: Any) -> bool:
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return False
    if not expected.any():  # which has no largest number
        return not found.any()
    return largest_difference(found.astype(np.float64), expected.astype(np.float64)) <= ALLOWED


def _dropout(layer: Layer) -> Iterator[Trial]:
    if layer.without_dropout:
        without = layer.without_dropout
        yield (
            "matches with dropout off: dropout was on",
            lambda: without(layer.weights, layer.arrays),
        )


def _with(layer: Layer, **changed: Any) -> Arrays:
    return layer.call({**layer.weights, **changed}, layer.arrays)


def _transposed(layer: Layer) -> Iterator[Trial]:
    square = [name for name, w in layer.weights.items() if w.ndim == 2 and len({*w.shape}) == 1]
    groups = [(name,) for name in square] + ([tuple(square)] if len(square) > 1 else [])
    for names in groups:
        verb = "is" if len(names) == 1 else "are"
        changed = {name: layer.weights[name].T for name in names}
        yield f"matches if {' and '.join(names)} {verb} transposed", _later(_with, layer, **changed)


def _later(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*arguments, **options)


def _blocks(layer: Layer) -> Iterator[Trial]:
    """Gates, or query, key and value, in another order, in all weights that hold so many."""
    for parts in (4, 3, 2):
        axes = {
            name: axis
            for name, w in layer.weights.items()
            for axis in range(w.ndim)
            if w.shape[axis] == max(w.shape) and w.shape[axis] % parts == 0
        }
        if not axes:
            continue
        for order in itertools.permutations(range(parts)):
            if order != tuple(range(parts)):
                changed = {
                    name: _permuted(layer.weights[name], axis, order) for name, axis in axes.items()
                }
                words = f"matches if the {parts} blocks (gates) of {', '.join(axes)} are permuted"
                yield f"{words}: {order}", _later(_with, layer, **changed)


def _permuted(array: Any, axis: int, order: Sequence[int]) -> Any:
    blocks = jnp.split(jnp.asarray(array), len(order), axis=axis)
    return jnp.concatenate([blocks[i] for i in order], axis=axis)


def _halves(layer: Layer) -> Iterator[Trial]:
    """Rotary positions that turn neighbouring pairs, or halves: the same but for the order."""
    pairs, halves = "(n h two) -> (n two h)", "(n two h) -> (n h two)"
    for pattern in (pairs, halves):
        for width in _widths(layer.arrays[0].shape[-1] if layer.arrays else 0):
            changed = [_turned(array, pattern, width) for array in layer.arrays]

            def turned_back(changed: Arrays = changed, pattern: str = pattern, width: int = width):  # type: ignore[no-untyped-def]
                inverse = halves if pattern == pairs else pairs
                found = layer.call(layer.weights, changed)
                return [_turned(array, inverse, width) for array in found]

            yield ROTARY, turned_back
        linears = sorted({name.rpartition(".")[0] or name for name in layer.weights})
        smallest = min((w.shape[-1] for w in layer.weights.values() if w.ndim == 2), default=0)
        for width, two in itertools.product(_widths(smallest), itertools.combinations(linears, 2)):
            new = {
                name: _turned(w, pattern, width)
                for name, w in layer.weights.items()
                if (name.rpartition(".")[0] or name) in two
            }
            yield ROTARY, _later(_with, layer, **new)


def _widths(size: int) -> list[int]:
    return [width for width in range(4, size + 1, 2) if size % width == 0]


def _turned(array: Any, pattern: str, width: int) -> Any:
    if not jnp.ndim(array) or array.shape[-1] % width:
        return array
    before, after = pattern.split(" -> ")
    sizes = {"two": 2, "h": width // 2}
    return rearrange(jnp.asarray(array), f"... {before} -> ... {after}", **sizes)


def _inputs(layer: Layer) -> Iterator[Trial]:
    """Masks among the inputs that mean the opposite."""
    for place, array in enumerate(layer.arrays):
        if jnp.asarray(array).dtype == bool:
            arrays = [*layer.arrays[:place], ~array, *layer.arrays[place + 1 :]]
            yield "matches if the mask is inverted", _later(layer.call, layer.weights, arrays)


def _changed(program: Program, words: str, step: Step, change: Change) -> Trial:
    return words, _later(program.run, {step.number: change})


def _masks(program: Program) -> Iterator[Trial]:
    for step in program.steps:
        if step.name == "select_n" and step.inputs[0].dtype == bool:
            yield _changed(program, "matches if the mask is inverted", step, _other_choice)


def _other_choice(step: Step) -> Any:
    return jax.lax.select_n(~step.inputs[0], *step.inputs[1:])


def _epsilon(program: Program) -> Iterator[Trial]:
    sites = [
        (step, found) for step in program.steps
        if step.name in ("add", "add_any")
        and (found := step.scalar()) and 0 <= found[1] < 1e-2
    ]  # fmt: skip
    for epsilon in EPSILONS:
        changes = {step.number: _adding(place, epsilon) for step, (place, _) in sites}
        if changes:
            yield f"matches with eps {epsilon:g}", _later(program.run, changes)


def _adding(place: int, number: float) -> Change:
    return lambda step: step.inputs[1 - place] + number


def _gelu(program: Program) -> Iterator[Trial]:
    """The tanh form where the erf form stands, or the other way."""
    for step in program.steps:
        if step.name in ("tanh", "erf", "erfc"):
            approximate = step.name != "tanh"
            words = f"{'tanh' if approximate else 'erf'} GELU instead of the other form"
            for x in _ancestors(program, step.number, 8):
                for later in program.steps[step.number : step.number + 8]:
                    if later.name == "mul" and later.outputs[0].shape == x.shape:
                        value = jax.nn.gelu(x, approximate=approximate)
                        yield _changed(program, f"matches with {words}", later, _constantly(value))


def _constantly(value: Any) -> Change:
    return lambda step: value


def _ancestors(program: Program, number: int, depth: int) -> list[Any]:
    """Arrays that a step depends on, the nearest last, each once."""
    found: dict[int, Any] = {}
    level = [number]
    for _ in range(depth):
        steps = [program.steps[each] for each in level]
        level = []
        for step in steps:
            for array, source in zip(step.inputs, step.sources, strict=True):
                if np.size(array) > 1:
                    found[id(array)] = array
                    level += [] if source is None else [source]
    return list(found.values())[::-1]


def _softmax(program: Program) -> Iterator[Trial]:
    """The softmax over another axis: a quotient of an exponential and its sum."""
    for step in program.steps:
        if step.name != "div" or step.sources[0] is None:
            continue
        top = program.steps[step.sources[0]]
        if top.name != "exp" or top.sources[0] is None:
            continue
        scores = program.steps[top.sources[0]].inputs[0]
        for axis in reversed(range(scores.ndim)):
            value = jax.nn.softmax(scores, axis=axis)
            words = f"matches with the softmax over axis {axis - scores.ndim}"
            if not _close(value, step.outputs[0]):
                yield _changed(program, words, step, _constantly(value))


def _heads(program: Program) -> Iterator[Trial]:
    """Heads that were split or merged by a reshape alone, all at once."""
    changes: dict[int, Change] = {}
    for step in program.steps:
        if step.name == "reshape":
            before, after = step.inputs[0].shape, step.outputs[0].shape
            if _splits(before, after):
                changes[step.number] = _split_heads
            elif _splits(after, before):
                changes[step.number] = _merged_heads
    if changes:
        words = "matches with a transpose: heads were split without one"
        yield words, _later(program.run, changes)
        for number, change in changes.items():
            yield words, _later(program.run, {number: change})


def _splits(whole: tuple[int, ...], parts: tuple[int, ...]) -> bool:
    """Whether [..., T, N · H] becomes [..., N, T, H]."""
    return (
        len(parts) == len(whole) + 1 > 2
        and parts[-2] == whole[-2]
        and parts[:-3] == whole[:-2]
        and parts[-3] > 1
    )


def _split_heads(step: Step) -> Any:
    N = step.outputs[0].shape[-3]
    return rearrange(step.inputs[0], "... t (n h) -> ... n t h", n=N)


def _merged_heads(step: Step) -> Any:
    return rearrange(step.inputs[0], "... n t h -> ... t (n h)")


def _precision(program: Program) -> Iterator[Trial]:
    """Products and sums in a narrower type, which the layer chooses for itself."""
    changes: dict[int, Change] = {}
    for step in program.steps:
        if step.name == "dot_general" and step.inputs[0].dtype != step.outputs[0].dtype:
            changes[step.number] = _product
        elif step.name == "convert_element_type" and step.outputs[0].dtype in NARROW:
            changes[step.number] = _unchanged
    if changes:
        words = "matches in float64: the layer itself computes in a narrower type"
        yield words, _later(program.run, changes)


def _product(step: Step) -> Any:
    wide = {**step.params, "preferred_element_type": jnp.dtype("float64")}
    return jax.lax.dot_general_p.bind(*step.inputs, **wide)


def _unchanged(step: Step) -> Any:
    return jnp.asarray(step.inputs[0], jnp.float64)


def _scale(program: Program) -> Iterator[Trial]:
    """Scores that are divided by another number."""
    sizes = {size for step in program.steps for array in step.inputs for size in np.shape(array)}
    candidates = {f"√{size}": size**-0.5 for size in sorted(sizes) if size > 1} | {"1": 1.0}
    for step in program.steps:
        found = step.scalar() if step.name in ("mul", "div") else None
        if found and found[1]:
            current = found[1] if step.name == "mul" else 1 / found[1]
            for name, factor in candidates.items():
                yield _changed(
                    program, f"matches with scale 1/{name}", step, _times(factor / current)
                )
    for step in program.steps:
        if step.name == "dot_general":
            for name, factor in candidates.items():
                yield _changed(program, f"matches with scale 1/{name}", step, _times(factor))


def _times(factor: float) -> Change:
    return lambda step: step.outputs[0] * factor


def _bias(layer: Layer, found: Arrays) -> list[str]:
    """A difference that is one vector for all rows."""
    if len(found) < 1 or layer.expected[0] is None or found[0].shape != layer.expected[0].shape:
        return []
    difference = np.asarray(layer.expected[0]) - np.asarray(found[0])
    rows = difference.reshape(-1, difference.shape[-1]) if difference.ndim else difference[None]
    if len(rows) > 1 and _close(rows, np.broadcast_to(rows[0], rows.shape)) and rows.any():
        return ["matches with one more vector added: a bias is missing, or is another"]
    return []
