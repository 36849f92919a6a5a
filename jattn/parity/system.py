"""What a row of the table of systems is, and ways to build its module that many rows share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jattn.functional import masks
from jattn.interop.rules import Rule

Array = jax.Array
Arguments = Mapping[str, Any]
Arrays = Mapping[str, Array]
Build = Callable[[Arguments, Any], nnx.Module]
Call = Callable[[Any, Arrays, Arguments], dict[str, Array]]


def constructor(module: Callable[..., nnx.Module]) -> Build:
    """Build a module with parameters; the fixture's arguments are its own."""

    def build(arguments: Arguments, dtype: Any) -> nnx.Module:
        return module(**arguments, param_dtype=dtype, rngs=nnx.Rngs(0))

    return build


def without_parameters(module: Callable[..., nnx.Module]) -> Build:
    """Build a module that has none, so no type for them either."""

    def build(arguments: Arguments, _dtype: Any) -> nnx.Module:
        return module(**arguments, rngs=nnx.Rngs(0))

    return build


def no_module(_arguments: Arguments, _dtype: Any) -> nnx.Module:
    """A system that is a pure function: an empty module."""
    return nnx.Module()


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
      row: its number.
      title: what it is.
      functions: public names of the pure functions that compute it.
      modules: public names of the Flax modules that own its parameters; none for a pure function.
      paper: authors and year.
      link: where the paper is.
      reference: name of the PyTorch reference in `experiments.torch_reference`; never imported
        here.
      build: a fixture's arguments and a parameter type → the module.
      call: module, inputs and arguments → outputs by name.
      rules: how its weights travel.
      note: what a reader of the table should know.

    Example:
      >>> from jattn.parity.systems import SYSTEMS
      >>> SYSTEMS[5].title, SYSTEMS[5].modules
      ('additive attention', ('jattn.nn.AdditiveAttention',))
    """

    row: int
    title: str
    functions: tuple[str, ...]
    paper: str
    link: str
    reference: str
    call: Call
    build: Build = no_module
    modules: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    note: str = ""


def padding(inputs: Arrays) -> masks.Mask | None:
    """The mask of the lengths, where a fixture has some."""
    return masks.padding(inputs["lengths"]) if "lengths" in inputs else None
