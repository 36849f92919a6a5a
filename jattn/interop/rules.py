"""Weights between PyTorch and Flax by rules that are data, in both directions from one table."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.interop.steps import Inverse, Step, converted, expression, placeholders
from jattn.interop.tensors import Stored, read


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

    Where the module knows a length, such as its number of heads, the size is None: `"(n h) d -> d n
    h"` with `sizes={"n": None}` takes n from the shape of the parameter.

    Args:
      pattern: an einops pattern in which both sides name the same axes.
      sizes: lengths of those axes that the shape alone does not tell; None: that of the axis in the
        Flax parameter, where it stands alone.

    Raises:
      ValueError: an axis whose size is None does not stand alone on the right side.

    Example:
      >>> transpose = Rearrange("o i -> i o")
      >>> transpose.forward(np.zeros((5, 3))).shape, transpose.inverse(np.zeros((3, 5))).shape
      ((3, 5), (5, 3))
      >>> heads = Rearrange("(n h) d -> d n h", {"n": None})
      >>> heads.like((3, 2, 5)).forward(np.zeros((10, 3))).shape
      (3, 2, 5)
    """

    pattern: str
    sizes: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        alone = re.sub(r"\(.*?\)", "", self.pattern.partition("->")[2]).split()
        for name, size in self.sizes.items():
            if size is None and name not in alone:
                raise ValueError(f"{name} must stand alone on the right side of {self.pattern!r}")

    def like(self, shape: tuple[int, ...]) -> "Rearrange":
        """The layout with each size of None as long as in the shape of the right side."""
        right = re.sub(r"\(.*?\)", "()", self.pattern.partition("->")[2]).split()
        if None not in self.sizes.values() or len(right) != len(shape):
            return self
        lengths = dict(zip(right, shape, strict=True))
        known = {name: lengths.get(name, size) for name, size in self.sizes.items()}
        return dataclasses.replace(self, sizes={**self.sizes, **known})

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Left side of the pattern → right side."""
        return einops.rearrange(array, self.pattern, **self._known())

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Right side of the pattern → left side."""
        left, right = self.pattern.split("->")
        return einops.rearrange(array, f"{right} -> {left}", **self._known())

    def _known(self) -> dict[str, int]:
        return {name: size for name, size in self.sizes.items() if size is not None}


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
        if array.strides[0] == 0:  # one array under several names
            return first
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
    ordinary rule. No path at all ignores a tensor: a buffer, say, or a parameter that PyTorch holds
    and never uses. It is not written on the way back.

    Args:
      torch: name of a PyTorch tensor, or a tuple of names that make up one array.
      flax: dotted path of a Flax parameter, or a tuple of paths that make up one array; `()`: the
        tensor is ignored.
      layout: how the array changes on the way.

    Raises:
      ValueError: where the two sides use different placeholders.

    Example:
      >>> rule = Rule("rnn.weight_ih_l{layer}", "layers.{layer}.input_kernel", TRANSPOSE)
      >>> rule.torch, rule.flax
      ('rnn.weight_ih_l{layer}', 'layers.{layer}.input_kernel')
      >>> rules = [Rule("weight", "kernel", TRANSPOSE), Rule("unused.{layer}.scale", ())]
      >>> tensors = {"weight": np.ones((2, 3), np.float32), "unused.7.scale": np.ones(5)}
      >>> linear = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
      >>> nnx.update(linear, to_flax(tensors, linear, rules))
      >>> [*from_flax(linear, rules)]
      ['weight']
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    layout: Layout = IDENTITY

    def __post_init__(self) -> None:
        patterns = (*names(self.torch), *names(self.flax))
        if len({placeholders(pattern) for pattern in patterns}) != 1:
            raise ValueError(
                f"all names of a rule have the same placeholders; got {self.torch} ↔ {self.flax}"
            )

    def takes(self, name: str) -> bool:
        """Whether a PyTorch tensor of that name is the rule's."""
        return any(re.fullmatch(expression(pattern), name) for pattern in names(self.torch))

    def fills(self, path: str) -> bool:
        """Whether a Flax parameter of that path is the rule's."""
        return any(re.fullmatch(expression(pattern), path) for pattern in names(self.flax))


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
    steps = [Step(names(rule.torch), names(rule.flax), rule.layout) for rule in rules]
    targets = {name: variable for name, (_, variable) in variables.items()}
    arrays = read(tensors)
    if any(isinstance(each, Stored) for each in arrays.values()):
        # All but the numbers is checked before the first of a file is read
        shapes = {name: _without_numbers(each) for name, each in arrays.items()}
        converted(shapes, steps, targets, dry=True)
    found = converted(arrays, steps, targets)
    return nnx.from_flat_state(
        (path, variable.replace(jnp.asarray(found.pop(name), variable.dtype)))
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
    steps = [Step(names(rule.flax), names(rule.torch), Inverse(rule.layout)) for rule in rules]
    return converted(arrays, steps, None)


def _without_numbers(tensor: Any) -> np.ndarray:
    """An array of the shape and the dtype that takes no memory."""
    return np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)


def _variables(target: nnx.Module | nnx.State) -> dict[str, tuple[tuple[Any, ...], nnx.Variable]]:
    state = target if isinstance(target, nnx.State) else nnx.state(target, nnx.Param)
    return {
        ".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)
    }
