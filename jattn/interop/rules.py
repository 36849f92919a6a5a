"""Weights between PyTorch and Flax by rules that are data, in both directions from one table."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.interop.errors import ConversionError
from jattn.interop.tensors import read


class Layout(Protocol):
    """A two-way change of form: `inverse(forward(array))` is the array again, bit for bit."""

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Form of PyTorch → form of Flax."""

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Form of Flax → form of PyTorch."""


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """A layout written as an einops pattern, read from left to right and from right to left.

    One pattern transposes (`"o i -> i o"`), drops an axis of one (`"1 hidden -> hidden"`),
    splits heads (`"(n h) d -> d n h"` with `sizes={"n": 8}`) or takes a packed projection apart
    (`"(parts o) i -> parts i o"` with `sizes={"parts": 3}`, for a rule with three targets).

    Args:
      pattern: an einops pattern in which both sides name the same axes.
      sizes: lengths of those axes that the shape alone does not tell.

    Example:
      >>> transpose = Rearrange("o i -> i o")
      >>> transpose.forward(np.zeros((5, 3))).shape, transpose.inverse(np.zeros((3, 5))).shape
      ((3, 5), (5, 3))
    """

    pattern: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Left side of the pattern → right side."""
        return einops.rearrange(array, self.pattern, **self.sizes)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Right side of the pattern → left side."""
        left, right = self.pattern.split("->")
        return einops.rearrange(array, f"{right} -> {left}", **self.sizes)


@dataclasses.dataclass(frozen=True)
class Tied:
    """One array that stands in PyTorch under several names, all of which a rule lists.

    Args:
      number: of names.

    Example:
      >>> rule = Rule(("embed.weight", "decode.weight"), "embed.embedding", Tied(2))
      >>> rule.layout.inverse(np.ones((5, 3))).shape
      (2, 5, 3)
    """

    number: int

    def forward(self, array: np.ndarray) -> np.ndarray:
        """The array, if all are equal."""
        first = array[0]
        if not all(np.array_equal(first, other, equal_nan=True) for other in array[1:]):
            raise ValueError("the tied tensors differ")
        return first

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """The array, once for each name."""
        return np.stack([array] * self.number)


IDENTITY = Rearrange("... -> ...")
TRANSPOSE = Rearrange("o i -> i o")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a weight table: PyTorch name(s) ↔ Flax path(s), and the layout between them.

    A placeholder in braces (`{layer}`) matches a whole number and stands for the same number on
    both sides. Several names on one side are one array with a leading axis: they are stacked before
    the layout, or unstacked after it; so a packed tensor, or one that is tied to another, is an
    ordinary rule.

    Args:
      torch: name of a PyTorch tensor, or a tuple of names that make up one array.
      flax: dotted path of a Flax parameter, or a tuple of paths that make up one array.
      layout: how the array changes on the way.

    Raises:
      ValueError: where the two sides use different placeholders.

    Example:
      >>> rule = Rule("rnn.weight_ih_l{layer}", "layers.{layer}.input_kernel", TRANSPOSE)
      >>> rule.torch, rule.flax
      ('rnn.weight_ih_l{layer}', 'layers.{layer}.input_kernel')
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    layout: Layout = IDENTITY

    def __post_init__(self) -> None:
        patterns = (*names(self.torch), *names(self.flax))
        if len({_placeholders(pattern) for pattern in patterns}) != 1:
            raise ValueError(
                f"all names of a rule have the same placeholders; got {self.torch} ↔ {self.flax}"
            )

    def takes(self, name: str) -> bool:
        """Whether a PyTorch tensor of that name is the rule's."""
        return any(re.fullmatch(_expression(pattern), name) for pattern in names(self.torch))


def names(side: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names on one side of a rule, one or several, as a tuple.

    Example:
      >>> names("weight"), names(("query", "key"))
      (('weight',), ('query', 'key'))
    """
    return (side,) if isinstance(side, str) else tuple(side)


def within(rules: Iterable[Rule], torch: str = "", flax: str = "") -> tuple[Rule, ...]:
    """The rules of a submodule, seen from the module that holds it.

    Args:
      rules: the submodule's weight table.
      torch: name of the submodule in PyTorch; `""` for the module itself.
      flax: dotted path of the submodule in Flax; `""` for the module itself.

    Returns:
      The same rules with both sides prefixed.

    Example:
      >>> (rule,) = within([Rule("bias", "bias")], "fc", "out")
      >>> rule.torch, rule.flax
      (('fc.bias',), ('out.bias',))
    """

    def prefixed(prefix: str, side: str | tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{prefix}.{name}" if prefix else name for name in names(side))

    return tuple(
        dataclasses.replace(rule, torch=prefixed(torch, rule.torch), flax=prefixed(flax, rule.flax))
        for rule in rules
    )


def to_flax(
    tensors: Mapping[str, Any], target: nnx.Module | nnx.State, rules: Iterable[Rule]
) -> nnx.State:
    """PyTorch tensors as the parameters of a Flax module.

    Every tensor is consumed and every parameter filled, or one error lists all that is wrong. The
    target itself is left as it is: `nnx.update(module, state)` loads the result. Nothing is
    rounded: every parameter keeps its dtype, into which a narrower float is widened and a wider one
    is refused.

    Args:
      tensors: PyTorch name → array or PyTorch tensor, as in a state dict.
      target: a Flax NNX module, or the state of its parameters (shapes and dtypes are enough:
        `nnx.eval_shape`).
      rules: the weight table.

    Returns:
      A new state with the structure, shapes and dtypes of the target's parameters.

    Raises:
      ConversionError: (a ValueError) what is missing, unused, ambiguous or unfit.

    Example:
      >>> linear = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
      >>> rules = [Rule("weight", "kernel", TRANSPOSE)]
      >>> state = to_flax({"weight": np.ones((2, 3), np.float32)}, linear, rules)
      >>> state["kernel"].shape
      (3, 2)
    """
    variables = _variables(target)
    steps = [_Step(names(rule.torch), names(rule.flax), rule.layout.forward) for rule in rules]
    problems = _Problems()
    targets = {name: variable for name, (_, variable) in variables.items()}
    arrays = _convert(read(tensors), steps, targets, problems)
    problems.raise_any()
    return nnx.from_flat_state(
        (path, variable.replace(jnp.asarray(arrays[name], variable.dtype)))
        for name, (path, variable) in variables.items()
    )


def from_flax(source: nnx.Module | nnx.State, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """The parameters of a Flax module as PyTorch tensors: the inverse of `to_flax`.

    Args:
      source: a Flax NNX module, or the state of its parameters (or of their gradients).
      rules: the weight table, the same as for `to_flax`.

    Returns:
      PyTorch name → array, each in the dtype of its source.

    Raises:
      ConversionError: (a ValueError) what is missing, unused, ambiguous or unfit.

    Example:
      >>> linear = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
      >>> from_flax(linear, [Rule("weight", "kernel", TRANSPOSE)])["weight"].shape
      (2, 3)
    """
    arrays = {
        name: np.asarray(variable.get_value()) for name, (_, variable) in _variables(source).items()
    }
    steps = [_Step(names(rule.flax), names(rule.torch), rule.layout.inverse) for rule in rules]
    problems = _Problems()
    tensors = _convert(arrays, steps, None, problems)
    problems.raise_any()
    return tensors


@dataclasses.dataclass
class _Problems:
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    ambiguous: list[str] = dataclasses.field(default_factory=list)
    unfit: list[str] = dataclasses.field(default_factory=list)

    def raise_any(self) -> None:
        found = vars(self)
        if any(found.values()):
            raise ConversionError(**found)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A rule in one direction; once its placeholders are bound, the names are literal."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Callable[[np.ndarray], np.ndarray]

    def bound_by(self, name: str) -> Iterator["_Step"]:
        for pattern in self.sources:
            if match := re.fullmatch(_expression(pattern), name):
                numbers = match.groupdict()
                yield dataclasses.replace(
                    self,
                    sources=tuple(source.format(**numbers) for source in self.sources),
                    targets=tuple(target.format(**numbers) for target in self.targets),
                )

    def __str__(self) -> str:
        return f"{' + '.join(self.sources)} → {' + '.join(self.targets)}"

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = [arrays[source] for source in self.sources]
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            raise ValueError("the parts differ in shape or dtype")
        changed = self.change(parts[0] if len(parts) == 1 else np.stack(parts))
        if len(self.targets) == 1:
            return {self.targets[0]: np.array(changed, order="C")}
        if changed.ndim == 0 or len(changed) != len(self.targets):
            raise ValueError(
                f"{changed.shape} is not {len(self.targets)} parts along the first axis"
            )
        return {
            target: np.array(part, order="C")
            for target, part in zip(self.targets, changed, strict=True)
        }


def _expression(pattern: str) -> str:
    """The regular expression of a name with placeholders; a repeated one is the same number."""
    expression = re.escape(pattern)
    for placeholder in _placeholders(pattern):
        written = re.escape(f"{{{placeholder}}}")
        expression = expression.replace(written, f"(?P<{placeholder}>0|[1-9][0-9]*)", 1)
        expression = expression.replace(written, f"(?P={placeholder})")
    return expression


def _placeholders(pattern: str) -> frozenset[str]:
    return frozenset(re.findall(r"{(\w+)}", pattern))


def _variables(target: nnx.Module | nnx.State) -> dict[str, tuple[tuple[Any, ...], nnx.Variable]]:
    state = target if isinstance(target, nnx.State) else nnx.state(target, nnx.Param)
    return {
        ".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)
    }


def _convert(
    arrays: Mapping[str, np.ndarray],
    steps: Sequence[_Step],
    targets: Mapping[str, nnx.Variable] | None,
    problems: _Problems,
) -> dict[str, np.ndarray]:
    """Run every step that the names call for; `targets` are the parameters, where known."""
    found: dict[str, np.ndarray] = {}
    filled: set[str] = set()
    for step in _bind(arrays, steps, problems):
        absent = [source for source in step.sources if source not in arrays]
        problems.missing += [f"{source} (for {step})" for source in absent]
        unknown = [name for name in step.targets if targets is not None and name not in targets]
        if unknown:
            problems.unused += [f"{step} (the module has no {', '.join(unknown)})"]
        twice = [target for target in step.targets if target in filled]
        problems.ambiguous += [
            f"{target} is filled more than once, last by {step}" for target in twice
        ]
        if not (absent or unknown or twice):
            found |= _run(step, arrays, targets, problems)
        filled.update(step.targets)
    problems.missing += [name for name in targets or () if name not in filled]
    return found


def _bind(
    arrays: Mapping[str, np.ndarray], steps: Sequence[_Step], problems: _Problems
) -> list[_Step]:
    """The steps with their placeholders bound, each once, in the order of the names."""
    chosen: list[_Step] = []
    for name in arrays:
        matches = [bound for step in steps for bound in step.bound_by(name)]
        if not matches:
            problems.unused.append(name)
        elif len(matches) > 1:
            problems.ambiguous.append(f"{name} matches {'; '.join(map(str, matches))}")
        chosen += [match for match in matches if match not in chosen]
    return chosen


def _run(
    step: _Step,
    arrays: Mapping[str, np.ndarray],
    targets: Mapping[str, nnx.Variable] | None,
    problems: _Problems,
) -> dict[str, np.ndarray]:
    got = ", ".join(str(arrays[source].shape) for source in step.sources)
    try:
        changed = step.run(arrays)
    except (ValueError, einops.EinopsError) as error:
        reason = str(error).splitlines()[-1].strip()
        problems.unfit.append(f"{step}: {got} does not fit the layout: {reason}")
        return {}
    for name, array in changed.items():
        if targets is None:
            break
        fault = _misfit(array.dtype, targets[name].dtype)
        if array.shape != targets[name].shape:
            fault = f"{got} gives {array.shape}; {name} is {targets[name].shape}"
        if fault:
            problems.unfit.append(f"{step}: {fault}")
    return changed


def _misfit(got: np.dtype, dtype: np.dtype) -> str:
    """Why a parameter of a dtype cannot hold every number of a tensor; empty: it can."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return f"JAX has no {dtype} unless jax_enable_x64 is set"
    floating = all(jnp.issubdtype(each, jnp.floating) for each in (got, dtype))
    if got == dtype or (floating and np.can_cast(got, dtype)):
        return ""
    rounded = " without being rounded" if floating else ""
    return f"{got} does not fit a parameter of {dtype}{rounded}"
