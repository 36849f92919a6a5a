"""Which layer of a port differs first from PyTorch's, by how much, and what would mend it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Group
from rich.table import Table

from jattn.interop.rules import Rule, from_flax, to_flax
from jattn.parity import layers, pairing
from jattn.parity.adapters import as_nnx, callable_with
from jattn.parity.compare import Row, compare_tensors
from jattn.parity.console import plain, table, verdict
from jattn.parity.fixtures import Fixture
from jattn.parity.hints import ALLOWED, Layer, hints
from jattn.parity.layers import Call, is_float
from jattn.parity.recording import record


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One call of a layer.

    Args:
      torch: PyTorch's label of it, `NAME[CALL]`; `""` for the whole module.
      flax: the path of the layer that was held against it.
      error: largest difference of its outputs, over the largest number, within the whole module.
      alone: the same where the layer is fed PyTorch's own inputs; None: they do not fit.
      gradient: the same of the gradient with respect to its outputs; None: there is none.
    """

    torch: str
    flax: str
    error: float
    alone: float | None = None
    gradient: float | None = None

    @property
    def own_error(self) -> float:
        """What the layer itself is to blame for, as far as it is known."""
        return self.error if self.alone is None else self.alone


@dataclasses.dataclass(frozen=True)
class Report:
    """How far a port is from PyTorch's module.

    Args:
      title: of the fixture.
      rows: tensor by tensor: outputs, and gradients of inputs and parameters.
      layers: every pair of layers, in the order in which they end.
      pairs: PyTorch's layers → the port's, as they were held against each other.
      rules: of the weights, as they were loaded.
      first: the first layer that differs; None: none does.
      first_backward: the last one whose gradient differs while all layers after it have theirs.
      hints: changes with which the first layer would be equal.
    """

    title: str
    rows: tuple[Row, ...]
    layers: tuple[LayerRow, ...]
    pairs: Mapping[str, str]
    rules: tuple[Rule, ...]
    first: LayerRow | None = None
    first_backward: LayerRow | None = None
    hints: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all outputs and gradients are equal."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def __str__(self) -> str:
        """The report as text."""
        return plain(self)

    def __rich__(self) -> Group:
        """The report with its tables, for a terminal."""
        how = "equal to" if self.passed else "differs from"
        wrong = [row for row in self.rows if not row.passed]
        equal = f"{len(self.rows) - len(wrong)} of {len(self.rows)} outputs and gradients are equal"
        parts: list[Any] = [
            f"{self.title}: {how} PyTorch in float64", "", _layer_table(self.layers), "", equal,
        ]  # fmt: skip
        if wrong:
            rows = [[verdict(False), row.name, row.relative_error] for row in wrong]
            parts += ["", table(["", "tensor", "relative"], rows, names=2)]
        if self.first:
            parts += ["", f"first layer that differs: {_where(self.first)}"]
            parts += [f"  {hint}" for hint in self.hints or ["no known change makes it equal"]]
        elif not self.passed and self.first_backward:
            where = _where(self.first_backward)
            parts += ["", f"forward equal; first gradient that differs, from the end: {where}"]
        return Group(*parts)


def diff(
    fixture: Fixture,
    module: Any,
    *,
    rules: Iterable[Rule] | None = None,
    pairs: Mapping[str, str] | None = None,
    call: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    params: Any = None,
) -> Report:
    """Hold a port, layer by layer, against what PyTorch's module did.

    Each layer is compared twice: within the whole, where errors add up, and alone, fed the inputs
    of PyTorch's layer; so a fault is found where it is. All is computed in float64.

    Args:
      fixture: from `record`, with the insides of the module.
      module: of Flax NNX or Linen, or a function of arrays.
      rules: of the weights; None: guessed from the pairs, with the tables of `jattn.interop`.
      pairs: PyTorch's layers, by name, → the port's, by path; None: guessed.
      call: `(module, inputs by name) -> outputs`; None: the module with the inputs in their order.
      params: a pytree that the function takes first, or the variables of the module of Linen; what
        they hold is replaced by PyTorch's weights.

    Raises:
      ConversionError: (a ValueError) the weights do not fit.
      TypeError: the port is no module and no function.
      ValueError: the port cannot be called with the inputs, or its outputs lack a name.

    Example:
      >>> x = np.array([1.0, 2.0])
      >>> fixture = Fixture("yours/double", "double", inputs={"x": x}, outputs={"output": 2 * x})
      >>> diff(fixture, lambda x: 2 * x).passed, diff(fixture, lambda x: 3 * x).passed
      (True, False)
    """
    call = call or _in_order
    exactly = jax.enable_x64(True), jax.default_matmul_precision("highest")
    with exactly[0], exactly[1], jax.numpy_dtype_promotion("standard"):
        inputs = {name: jnp.asarray(array) for name, array in fixture.inputs.items()}
        port = as_nnx(module, params, call, inputs)
        return _diff(fixture, _double(port), rules, pairs, call)


def check(torch_module: Any, module: Any, inputs: Any, **options: Any) -> Report:
    """Hold a port against a `torch.nn.Module`: `record`, then `diff`.

    Args:
      torch_module: any `torch.nn.Module`.
      module: of Flax NNX or Linen, or a function of arrays.
      inputs: of the PyTorch module, by name or in order.
      **options: those of `diff`.

    Raises:
      As `record` and `diff`.

    Example:
      >>> x = np.ones((5, 3))
      >>> linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> check(torch.nn.Linear(3, 2), linear, [x]).passed  # doctest: +SKIP
      True
    """
    return diff(record(torch_module, inputs, case=type(torch_module).__name__), module, **options)


def assert_matches(fixture: Fixture, module: Any, **options: Any) -> None:
    """A test in one line: the port gives PyTorch's outputs and gradients.

    Args:
      fixture: from `record`, or from its file by `jattn.parity.load`.
      module, **options: as for `diff`.

    Raises:
      AssertionError: it does not; the message is the whole report.
      Else as `diff`.

    Example:
      >>> x = np.array([1.0, 2.0])
      >>> fixture = Fixture("yours/double", "double", inputs={"x": x}, outputs={"output": 2 * x})
      >>> assert_matches(fixture, lambda x: x + x)
    """
    report = diff(fixture, module, **options)
    if not report.passed:
        raise AssertionError(f"\n{report}")


def _in_order(module: Any, inputs: Mapping[str, Any]) -> Any:
    return module(*inputs.values())


def _double(module: nnx.Module) -> Any:
    graph, parameters, rest = layers.split(nnx.clone(module))
    doubled = jax.tree.map(
        lambda array: jnp.asarray(array, jnp.float64) if is_float(array) else array, parameters
    )
    return nnx.merge(graph, doubled, rest)


def _diff(
    fixture: Fixture, module: nnx.Module, rules: Any, pairs: Any, call: Callable[..., Any]
) -> Report:
    inputs = {name: jnp.asarray(array) for name, array in fixture.inputs.items()}
    call = functools.partial(_called, call, list(fixture.outputs))

    def whole(module: nnx.Module) -> list[Any]:
        return call(module, inputs)

    with callable_with(inputs):
        _, before = layers.calls(module, whole)
    if pairs is None:
        pairs = pairing.guess_pairs(fixture, before)
    rules = tuple(pairing.guess_rules(fixture, module, pairs, before) if rules is None else rules)
    nnx.update(module, to_flax(fixture.parameters, module, rules))
    output, found = layers.calls(module, whole)
    root = Call("", _Bound(module, call, tuple(inputs)), tuple(inputs.values()), {}, output)
    gradients = _layer_gradients(fixture, module, whole, output)
    rows = _layer_rows(fixture, [*found, root], {**pairs, "": ""}, gradients)
    first = next((row for row, _ in rows if not row.own_error <= ALLOWED), None)
    tried: list[str] = []
    if first:
        tried = _hints(fixture, next(each for row, each in rows if row is first), first.torch)
    tensors = _tensor_rows(fixture, module, call, rules)
    backward = [row for row, _ in rows if row.gradient is not None and row.gradient > ALLOWED]
    return Report(
        fixture.title, tensors, tuple(row for row, _ in rows), pairs, rules, first,
        backward[-1] if backward else None,
        tuple(tried),
    )  # fmt: skip


def _called(
    call: Callable[..., Any], names: Sequence[str], module: nnx.Module, inputs: Mapping[str, Any]
) -> list[Any]:
    """What the port gives, as arrays in the order of PyTorch's outputs."""
    output = call(module, inputs)
    if not isinstance(output, Mapping):
        return layers.arrays_of(output)
    if lacking := [name for name in names if name not in output]:
        raise ValueError(f"its outputs {', '.join(output)} lack {', '.join(lacking)}")
    return [output[name] for name in names]


class _Bound(nnx.Module):
    """The whole port as a layer."""

    def __init__(self, module: nnx.Module, call: Callable[..., Any], names: tuple[str, ...]):
        self.module, self.call, self.names = module, call, names

    def __call__(self, *arrays: Any) -> Any:
        return self.call(self.module, dict(zip(self.names, arrays, strict=True)))


def _layer_gradients(
    fixture: Fixture, module: nnx.Module, whole: Callable[..., Any], output: list[Any]
) -> Mapping[str, list[Any]]:
    """Gradients with respect to the outputs of the port's layers."""
    if not fixture.module_gradients:
        return {}
    cotangents = _cotangents(fixture, output)
    try:
        return layers.gradients(module, whole, cotangents)
    except (TypeError, ValueError):  # a layer that is not differentiable
        return {}


def _cotangents(fixture: Fixture, output: list[Any]) -> list[Any]:
    """PyTorch's cotangents of the port's outputs; zeros where they do not fit."""
    given = [fixture.cotangents.get(name) for name in fixture.outputs]
    fitted: list[Any] = []
    for leaf, cotangent in itertools.zip_longest(output, given[: len(output)]):
        if not is_float(leaf):
            fitted.append(np.zeros(leaf.shape, jax.dtypes.float0))
        elif cotangent is None or cotangent.shape != leaf.shape:
            fitted.append(jnp.zeros_like(leaf))
        else:
            fitted.append(jnp.asarray(cotangent, leaf.dtype))
    return fitted


def _layer_rows(
    fixture: Fixture, found: Sequence[Call], pairs: Mapping[str, str],
    gradients: Mapping[str, list[Any]],
) -> list[tuple[LayerRow, Call]]:  # fmt: skip
    """A row for each call of a paired layer, in the order in which PyTorch's layers end."""
    numbers: dict[str, int] = {}
    by_label: dict[str, Call] = {}
    for each in found:
        by_label[f"{each.path}[{numbers.get(each.path, 0)}]"] = each
        numbers[each.path] = numbers.get(each.path, 0) + 1
    rows = []
    for label in dict.fromkeys([*(_call_of(key) for key in fixture.modules), "[0]"]):
        name = pairing.layer_of(label)
        path = pairs.get(name)
        call = None if path is None else by_label.get(f"{path}[{label.partition('[')[2]}")
        if path is None or call is None:
            continue
        expected = _expected(fixture, label)
        arrays = _inputs(fixture, label, call)
        alone = None if arrays is None else _error(_tried(call, arrays), expected)
        gradient = gradients.get(f"{path}[{label.partition('[')[2]}")
        theirs = _items(fixture.module_gradients, label)
        row = LayerRow(
            label if name else "", path, _error(call.outputs, expected), alone,
            _error(gradient, theirs) if gradient and theirs else None,
        )  # fmt: skip
        rows.append((row, call))
    return rows


def _call_of(label: str) -> str:
    """`NAME[CALL]` of `NAME[CALL][ITEM]`."""
    name, _, rest = label.partition("[")
    return f"{name}[{rest.partition(']')[0]}]"


def _items(arrays: Mapping[str, np.ndarray], label: str) -> list[np.ndarray]:
    return [array for key, array in arrays.items() if _call_of(key) == label]


def _expected(fixture: Fixture, label: str) -> list[np.ndarray]:
    return list(fixture.outputs.values()) if label == "[0]" else _items(fixture.modules, label)


def _inputs(fixture: Fixture, label: str, call: Call) -> list[Any] | None:
    """PyTorch's inputs for the port's layer: each the first one left of its shape, or one again."""
    given = (
        list(fixture.inputs.values()) if label == "[0]" else _items(fixture.module_inputs, label)
    )
    if not given:
        return None
    left = list(given)
    chosen = []
    for array in call.arrays:
        fits = [each for each in (*left, *given) if _alike(each, array)]
        if fits:
            left = [each for each in left if each is not fits[0]]
            chosen.append(jnp.asarray(fits[0]))
        elif is_float(array):
            return None
        else:
            chosen.append(array)  # such as a mask that PyTorch's layer makes for itself
    return chosen


def _alike(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.dtype.kind == np.dtype(other.dtype).kind


def _tried(call: Call, arrays: list[Any]) -> list[Any] | None:
    try:
        return call.again(call.weights, arrays)
    except (TypeError, ValueError):
        return None


def _error(found: Sequence[Any] | None, expected: Sequence[Any]) -> float:
    """The largest difference over the largest number; infinite where shapes differ."""
    if not found or not expected:
        return math.inf
    errors = []
    for one, other in zip(found, expected, strict=False):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if one.shape != other.shape or not np.isfinite(one).all():
            return math.inf
        scale = float(np.abs(other).max(initial=0.0)) or 1.0
        errors.append(float(np.abs(one - other).max(initial=0.0)) / scale)
    return max(errors)


def _hints(fixture: Fixture, call: Call, torch: str) -> list[str]:
    label = torch or "[0]"
    arrays = _inputs(fixture, label, call) or call.arrays
    expected = _expected(fixture, label)[: len(call.outputs)]
    # The whole port is held in another module, whose name is no part of its parameters' paths
    prefix = "module." if isinstance(call.layer, _Bound) else ""

    def again(weights: Mapping[str, Any], arrays: Sequence[Any], **options: Any) -> list[Any]:
        whole = {f"{prefix}{name}": weight for name, weight in weights.items()}
        return call.again(whole, arrays, **options)

    layer = Layer(
        again, {name.removeprefix(prefix): weight for name, weight in call.weights.items()},
        arrays, expected, functools.partial(again, evaluate=True),
    )  # fmt: skip
    return hints(layer)


def _tensor_rows(
    fixture: Fixture, module: nnx.Module, call: Callable[..., Any], rules: tuple[Rule, ...]
) -> tuple[Row, ...]:
    """Outputs and gradients of inputs and parameters, held against PyTorch's."""
    graph, parameters, rest = layers.split(module)
    inputs = {name: jnp.asarray(array) for name, array in fixture.inputs.items()}
    floating = {name: array for name, array in inputs.items() if is_float(array)}

    def outputs(parameters: Any, floating: Any) -> Any:
        fresh = jax.tree.map(jnp.asarray, rest)
        return call(nnx.merge(graph, parameters, fresh), inputs | floating)

    output, pull_back = jax.vjp(outputs, parameters, floating)
    found = {f"output/{name}": leaf for name, leaf in zip(fixture.outputs, output, strict=False)}
    if fixture.cotangents:
        of_parameters, of_inputs = pull_back(_cotangents(fixture, output))
        found |= {f"grad/param/{k}": each for k, each in from_flax(of_parameters, rules).items()}
        found |= {f"grad/input/{k}": each for k, each in of_inputs.items()}
    arrays = {name: np.asarray(array) for name, array in found.items()}
    return compare_tensors(fixture, arrays, np.dtype(np.float64))


def _layer_table(rows: Sequence[LayerRow]) -> Table:
    cells = [
        [
            verdict(row.own_error <= ALLOWED), row.torch or "(all)",
            row.flax or "(all)", row.error, row.alone, row.gradient,
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "PyTorch", "the port", "within", "alone", "gradient"], cells, names=3)


def _where(row: LayerRow) -> str:
    if not row.torch:
        return "the module itself, for its layers are equal"
    return f"{row.flax} (PyTorch's {row.torch}), by {row.own_error:.1e} of its largest number"
