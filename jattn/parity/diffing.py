"""Which layer of a port differs first from PyTorch's, by how much, and what would mend it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import FlaxError
from rich.console import Group
from rich.table import Table

from jattn.interop.errors import ConversionError
from jattn.interop.rules import Rule, from_flax, to_flax
from jattn.parity import layers, pairing
from jattn.parity.adapters import as_nnx, callable_with
from jattn.parity.compare import Row, compare_tensors
from jattn.parity.console import plain, table, verdict
from jattn.parity.fixtures import Fixture
from jattn.parity.hints import ALLOWED, Layer, hints
from jattn.parity.layers import Call, dotted, is_float
from jattn.parity.layouts import error, nearest
from jattn.parity.recording import record


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One call of a layer.

    Args:
      torch: PyTorch's label of it, `NAME[CALL]`; `""` for the whole module.
      flax: the path of the layer that was held against it.
      error: largest difference of its outputs, over the largest number, within the whole module;
        None: they have other shapes.
      alone: the same where the layer is fed PyTorch's own inputs; None: they do not fit.
      gradient: the same of the gradient with respect to its outputs; None: there is none.
      shapes: of its outputs and of PyTorch's, where these differ.
    """

    torch: str
    flax: str
    error: float | None
    alone: float | None = None
    gradient: float | None = None
    shapes: str = ""

    @property
    def own_error(self) -> float | None:
        """What the layer itself is to blame for, as far as it is known."""
        return min((each for each in (self.error, self.alone) if each is not None), default=None)


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
      hints: changes with which the first layer would be equal, and what explains a gradient.
      more: how many outputs the port has that PyTorch's module has not; they are not compared.
    """

    title: str
    rows: tuple[Row, ...]
    layers: tuple[LayerRow, ...]
    pairs: Mapping[str, str]
    rules: tuple[Rule, ...]
    first: LayerRow | None = None
    first_backward: LayerRow | None = None
    hints: tuple[str, ...] = ()
    more: int = 0

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
        if self.more:
            equal += f"; the port has {self.more} more, which PyTorch's has not"
        parts: list[Any] = [
            f"{self.title}: {how} PyTorch in float64", "", _layer_table(self.layers), "", equal,
        ]  # fmt: skip
        if wrong:
            rows = [[verdict(False), row.name, row.reason, row.relative_error] for row in wrong]
            parts += ["", table(["", "tensor", "", "relative"], rows, names=3)]
        if self.first:
            parts += ["", f"first layer that differs: {_where(self.first, self.first.own_error)}"]
        elif not self.passed and (last := self.first_backward):
            where = _where(last, last.gradient)
            parts += ["", f"forward equal; first gradient that differs, from the end: {where}"]
        if not self.passed:
            parts += [f"  {hint}" for hint in self.hints or ["no known change makes it equal"]]
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
      rules: of weights; all others are guessed from the pairs, with the tables of `jattn.interop`.
      pairs: PyTorch's layers, by name, → the port's, by path; all others are guessed.
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
    """A copy in float64; what computes in the dtype of its parameters does so in theirs of now."""
    copy = nnx.clone(module)
    for _, layer in nnx.iter_modules(copy):
        weights = jax.tree.leaves(nnx.state(layer, nnx.Param))
        for name in ("dtype", "param_dtype"):  # the carry of a recurrent cell has the second
            dtype = getattr(layer, name, None)
            if dtype is not None and weights and all(each.dtype == dtype for each in weights):
                vars(layer)[name] = jnp.float64
    graph, *states = layers.split(copy)
    doubled = jax.tree.map(
        lambda array: jnp.asarray(array, jnp.float64) if is_float(array) else array, states
    )
    return nnx.merge(graph, *doubled)


def _diff(
    fixture: Fixture, module: nnx.Module, rules: Any, pairs: Any, call: Callable[..., Any]
) -> Report:
    inputs = {name: jnp.asarray(array) for name, array in fixture.inputs.items()}
    call = functools.partial(_called, call, list(fixture.outputs))

    def whole(module: nnx.Module) -> list[Any]:
        return call(module, inputs)

    with callable_with(inputs):
        _, before = layers.calls(module, whole)
    pairs = pairing.with_given(pairing.guess_pairs(fixture, before), pairs or {}, fixture)
    rules = _load(fixture, module, rules, pairs, before)
    unused = _fill_statistics(fixture, module, pairs)
    output, found = layers.calls(module, whole)
    root = Call("", _Bound(module, call, tuple(inputs)), tuple(inputs.values()), {}, output)
    gradients = _layer_gradients(fixture, module, whole, output)
    rows = _layer_rows(fixture, [*found, root], {**pairs, "": ""}, gradients)
    tensors, hints = _tensor_rows(fixture, module, call, rules)
    passed = all(row.passed for row in tensors)
    first = None if passed else _first(row for row, _ in rows)
    if first:
        call_of_first = next(each for row, each in rows if row is first)
        hints = [*_hints(fixture, call_of_first, first.torch), *hints]
    hints += [] if passed else unused
    backward = [row for row, _ in rows if row.gradient is not None and row.gradient > ALLOWED]
    return Report(
        fixture.title, tensors, tuple(row for row, _ in rows), pairs, rules, first,
        backward[-1] if backward else None, tuple(hints),
        max(len(output) - len(fixture.outputs), 0),
    )  # fmt: skip


def _load(
    fixture: Fixture, module: nnx.Module, rules: Any, pairs: Mapping[str, str],
    calls: Sequence[Call],
) -> tuple[Rule, ...]:  # fmt: skip
    """Fill the port with PyTorch's weights; the rules that do it."""
    rules = pairing.guess_rules(fixture, module, pairs, calls, rules or ())
    try:
        nnx.update(module, to_flax(fixture.parameters, module, rules))
    except ConversionError as error:
        hint = "rules that are not given are guessed from names and shapes: pass rules"
        raise ConversionError(**vars(error) | {"hint": hint}) from None
    return rules


def _fill_statistics(fixture: Fixture, module: nnx.Module, pairs: Mapping[str, str]) -> list[str]:
    """Give batch norms PyTorch's running statistics; tell which buffers nothing takes."""
    norms = {dotted(path): layer for path, layer in nnx.iter_modules(module)}
    left = dict(fixture.buffers)
    for name, path in {**pairs, "": ""}.items():
        norm, prefix = norms.get(path), f"{name}." if name else ""
        if isinstance(norm, nnx.BatchNorm) and f"{prefix}running_mean" in left:
            norm.mean.set_value(jnp.asarray(left.pop(f"{prefix}running_mean")))
            norm.var.set_value(jnp.asarray(left.pop(f"{prefix}running_var")))
    return [f"the port is not given PyTorch's buffers {', '.join(left)}"] if left else []


def _first(rows: Iterable[LayerRow]) -> LayerRow | None:
    """The first layer that differs; if none does, the first whose shapes cannot be compared."""
    rows = list(rows)
    unknown = [row for row in rows if row.own_error is None]
    differing = [row for row in rows if row.own_error is not None and not row.own_error <= ALLOWED]
    return next(iter([*differing, *unknown]), None)


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
        alone = error(arrays and _tried(call, arrays), expected, exact=not name)
        gradient = gradients.get(f"{path}[{label.partition('[')[2]}")
        within = error(call.outputs, expected, exact=not name)
        theirs = _items(fixture.module_gradients, label)
        shapes = [", ".join(str(x.shape) for x in each) for each in (call.outputs, expected)]
        row = LayerRow(
            label if name else "", path, within, alone, error(gradient, theirs),
            "" if within is not None else f"{shapes[0]} for {shapes[1]}",
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
        fits = ((each, _like(each, array)) for each in (*left, *given))
        taken, fitting = next((pair for pair in fits if pair[1] is not None), (None, None))
        if fitting is not None:
            left = [each for each in left if each is not taken]
            chosen.append(jnp.asarray(fitting))
        elif is_float(array):
            return None
        else:
            chosen.append(array)  # such as a mask that PyTorch's layer makes for itself
    return chosen


def _like(theirs: np.ndarray, ours: Any) -> np.ndarray | None:
    same_kind = theirs.dtype.kind == np.dtype(ours.dtype).kind
    return nearest(theirs, ours) if same_kind else None


def _tried(call: Call, arrays: list[Any]) -> list[Any] | None:
    try:
        return call.again(call.weights, arrays)
    except (TypeError, ValueError, FlaxError):  # a shared layer lacks what others hold
        return None


def _hints(fixture: Fixture, call: Call, torch: str) -> list[str]:
    label = torch or "[0]"
    arrays = _inputs(fixture, label, call) or call.arrays
    theirs = zip(_expected(fixture, label), call.outputs, strict=False)
    expected = [nearest(each, ours) for each, ours in theirs]
    if not any(each is not None for each in expected):
        return []
    # The whole port is held in another module, whose name is no part of its parameters' paths
    prefix = "module." if isinstance(call.layer, _Bound) else ""

    def again(weights: Mapping[str, Any], arrays: Sequence[Any], **options: Any) -> list[Any]:
        whole = {f"{prefix}{name}": weight for name, weight in weights.items()}
        return call.again(whole, arrays, **options)

    layer = Layer(
        again, {name.removeprefix(prefix): weight for name, weight in call.weights.items()},
        arrays, expected, functools.partial(again, evaluate=True),
    )  # fmt: skip
    try:
        return hints(layer)
    except FlaxError:
        return []


def _tensor_rows(
    fixture: Fixture, module: nnx.Module, call: Callable[..., Any], rules: tuple[Rule, ...]
) -> tuple[tuple[Row, ...], list[str]]:
    """Outputs and gradients, held against PyTorch's, and what explains a difference."""
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
    hints = [*_lacking(fixture, output), *_frozen(fixture, arrays)]
    return compare_tensors(fixture, arrays, np.dtype(np.float64)), hints


def _lacking(fixture: Fixture, output: Sequence[Any]) -> list[str]:
    """Gradients are of all outputs together, so that one less makes all of them differ."""
    names = list(fixture.outputs)[len(output) :]
    if not names:
        return []
    return [f"the port gives no {', '.join(names)}, of which PyTorch's gradients are, too"]


def _frozen(fixture: Fixture, found: Mapping[str, np.ndarray]) -> list[str]:
    """Rows of a table that PyTorch never trains."""
    hints = []
    for name, theirs in fixture.parameter_gradients.items():
        ours = found.get(f"grad/param/{name}")
        if ours is not None and ours.shape == theirs.shape and theirs.ndim == 2:
            rows = np.flatnonzero((theirs == 0).all(axis=1) & (ours != 0).any(axis=1))
            rest = np.delete(ours - theirs, rows, axis=0)
            if len(rows) == 1 and np.abs(rest).max(initial=0) <= ALLOWED * np.abs(theirs).max():
                hints.append(f"row {rows[0]} of {name} gets no gradient in PyTorch: padding_idx")
    return hints


def _layer_table(rows: Sequence[LayerRow]) -> Table:
    cells = [
        [
            "—" if row.own_error is None else verdict(row.own_error <= ALLOWED),
            row.torch or "(all)", row.flax or "(all)", row.error, row.alone, row.gradient,
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "PyTorch", "the port", "within", "alone", "gradient"], cells, names=3)


def _where(row: LayerRow, error: float | None) -> str:
    if not row.torch and row.own_error is not None:
        return "the module itself, for all paired layers are equal"
    name = f"{row.flax} (PyTorch's {row.torch})" if row.torch else "the module itself"
    if error is None:
        return f"{name}, by the shapes of its outputs, {row.shapes}"
    return f"{name}, by {error:.1e} of its largest number"
