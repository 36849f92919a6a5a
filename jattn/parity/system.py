"""What a system is, and ways to build its module that many share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from einops import rearrange
from flax import nnx

from jattn.attention import attend
from jattn.functional import masks, ropes
from jattn.interop import Rule, torch_rules

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
    """One attention system.

    Args:
      slug: its name: the family that it is listed with, and a word of its own.
      row: its place in the order of the table; several systems may share one.
      title: what it is.
      functions: public names of the pure functions that compute it.
      modules: public names of the Flax modules that own its parameters; none for a pure function.
      paper: authors and year.
      link: where the paper is.
      reference: name of the PyTorch reference in `experiments.torch_reference`; never imported
        here.
      build: a fixture's arguments and a parameter type → the module.
      call: module, inputs and arguments → outputs by name.
      rules: how its weights travel; None: by the table of the module's class.
      note: what a reader of the table should know.

    Example:
      >>> from jattn.parity.systems import SYSTEMS
      >>> SYSTEMS["pooling/additive"].title, SYSTEMS["pooling/additive"].modules
      ('additive attention', ('jattn.nn.AdditiveAttention',))
    """

    slug: str
    row: int
    title: str
    functions: tuple[str, ...]
    paper: str
    link: str
    reference: str
    call: Call
    build: Build = no_module
    modules: tuple[str, ...] = ()
    rules: tuple[Rule, ...] | None = None
    note: str = ""

    def rules_for(self, module: nnx.Module) -> tuple[Rule, ...]:
        """The rules between its module and its reference."""
        return torch_rules(module) if self.rules is None else self.rules


def rope_of(description: Mapping[str, Any]) -> ropes.Rope:
    """The rope that a fixture describes by its class, `kind`, and the arguments of that.

    Example:
      >>> rope_of({"kind": "Linear", "factor": 4.0})
      Linear(base=10000.0, factor=4.0)
    """
    numbers = {name: number for name, number in description.items() if name != "kind"}
    return getattr(ropes, description["kind"])(**numbers)


def padding(inputs: Arrays) -> masks.Mask | None:
    """The mask of the lengths, where a fixture has some."""
    return masks.padding(inputs["lengths"]) if "lengths" in inputs else None


def attend_single_head(inputs: Arrays, mask: Any, score: Callable[..., Array]) -> dict[str, Array]:
    """`attend` for operands [B, T, H] without a head axis."""
    query, key, value = (
        rearrange(inputs[name], "b t h -> b t 1 h") for name in ("query", "key", "value")
    )
    output, weights = attend(query, key, value, score=score, mask=mask, return_weights=True)
    return {
        "output": rearrange(output, "b t 1 v -> b t v"),
        "weights": rearrange(weights, "b 1 t s -> b t s"),
    }
