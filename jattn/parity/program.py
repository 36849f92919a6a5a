"""A JAX function as equations, one after the other, of which some can be changed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jattn.functional import compat

Array = Any


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation as it was evaluated.

    Args:
      number: its place among all steps of the program.
      name: of its primitive.
      params: of its primitive.
      inputs, outputs: arrays.
      sources: for each input the number of the step that made it; None: an argument or constant.
    """

    number: int
    name: str
    params: Mapping[str, Any]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    sources: tuple[int | None, ...]

    def scalar(self) -> tuple[int, float] | None:
        """Which of two inputs is a number that the other, an array, is combined with."""
        if len(self.inputs) != 2:
            return None
        for place, other in ((0, 1), (1, 0)):
            if np.size(self.inputs[place]) == 1 and np.size(self.inputs[other]) > 1:
                return place, float(np.asarray(self.inputs[place]).item())
        return None


Change = Callable[[Step], Array]


class Program:
    """A function of arrays, traced once, that can be run again with other equations.

    Args:
      function: of arrays, or pytrees of them.
      *arguments: what it is called with.

    Attributes:
      steps: of the run without changes.
      results: of it, the arrays that it returns.

    Example:
      >>> program = Program(lambda x: 2.0 * x + 1.0, np.ones(3))
      >>> [step.name for step in program.steps]
      ['mul', 'add']
      >>> program.run({0: lambda step: 5.0 * step.inputs[1]})[0].tolist()
      [6.0, 6.0, 6.0]
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.closed = jax.make_jaxpr(function)(*arguments)
        self.arguments = [jax.numpy.asarray(leaf) for leaf in jax.tree.leaves(arguments)]
        self.steps: list[Step] = []
        self.results = self.run(record=True)

    def run(
        self, changes: Mapping[int, Change] | None = None, *, record: bool = False
    ) -> list[Array]:
        """The results, where each step of `changes` gives what its change makes of it."""
        changes, count = changes or {}, 0
        made: dict[int, int] = {}

        def apply(equation: Any, inputs: list[Any]) -> Sequence[Any]:
            nonlocal count
            number, count = count, count + 1
            if changes:  # a wider number than the program was traced with may arrive
                inputs = _of_one_type(inputs)
            outputs = compat.apply_equation(equation, inputs)
            if record or number in changes:
                sources = tuple(made.get(id(each)) for each in inputs)
                step = Step(
                    number, equation.primitive.name, equation.params, tuple(inputs),
                    tuple(outputs), sources,
                )  # fmt: skip
                if number in changes:
                    outputs = [changes[number](step), *outputs[1:]]
                if record:
                    self.steps.append(step)
            made.update({id(each): number for each in outputs})
            kept.append(outputs)  # an array that is gone leaves its id to another
            return outputs

        kept: list[Any] = []
        return compat.step_by_step(self.closed, self.arguments, apply)


def _of_one_type(inputs: Sequence[Any]) -> list[Any]:
    """Floating inputs in the widest type of them; all others as they are."""
    floating = [
        jax.numpy.issubdtype(getattr(each, "dtype", int), jax.numpy.floating) for each in inputs
    ]
    types = {each.dtype for each, is_float in zip(inputs, floating, strict=True) if is_float}
    if len(types) < 2:
        return list(inputs)
    widest = max(types, key=lambda dtype: dtype.itemsize)
    return [
        jax.numpy.asarray(each, widest) if is_float else each
        for each, is_float in zip(inputs, floating, strict=True)
    ]
