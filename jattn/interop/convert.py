"""Weights of a Flax module to and from PyTorch; the tables are found by the module's class."""

import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx

from jattn.interop.errors import ConversionError
from jattn.interop.huggingface import bert, causal_lm
from jattn.interop.rules import Rule, from_flax, names, to_flax
from jattn.interop.steps import Step
from jattn.interop.tensors import read
from jattn.interop.torch import (
    char_rnn,
    classification,
    layers,
    multi_head,
    pooling,
    recurrent,
    sequence_pooling,
    transformer,
    translation,
)
from jattn.interop.torch.table import Table

_FAMILIES: tuple[Any, ...] = (
    layers,
    pooling,
    multi_head,
    transformer,
    sequence_pooling,
    recurrent,
    char_rnn,
    classification,
    translation,
    causal_lm,
    bert,
)
TABLES: Mapping[type[nnx.Module], tuple[Table, ...]] = MappingProxyType(
    {cls: tables for family in _FAMILIES for cls, tables in family.TABLES.items()}
)
"""Flax class → its tables; the first is the one that `to_torch` writes."""


def load_torch(
    module: nnx.Module, state_dict: Mapping[str, Any], rules: Iterable[Rule] | None = None
) -> None:
    """Load the weights of a PyTorch module into a Flax module, in place.

    The module is one of jattn, of a class derived from one, or Flax's `nnx.Linear`, `Embed`,
    `LayerNorm`, `RMSNorm` or `MultiHeadAttention`. Where PyTorch has several names for it, those of
    the tensors tell which: a `MultiHeadAttention` takes the weights of a
    `torch.nn.MultiheadAttention`, with or without `kdim` and `vdim`; that of jattn also Linears
    `W_q`, `W_k`, `W_v`, `W_o`, or `q_proj`, `k_proj`, `v_proj` and `out_proj` or `o_proj`.
    Parameters keep their dtype, and nothing is rounded: narrower floats are widened, wider ones
    refused.

    Where weights do not fit, the error also says which names are near, and which other layout would
    fit. A tensor that the module has no use for is ignored by a rule without a path,
    `Rule("rotary.inv_freq", ())`, and by no other means.

    Args:
      module: filled in place, or after an error left as it was.
      state_dict: name → PyTorch tensor or array, as `torch_module.state_dict()` gives it; what
        `safetensors` reads, too. No `torch.nn.Module`.
      rules: a weight table of your own; by default that of the module's class.

    Raises:
      ConversionError: (a ValueError) all that is missing, unused, ambiguous or unfit.
      TypeError: the class has no table and there are no rules, or `state_dict` is no mapping.

    Example:
      >>> linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> weights = to_torch(linear) | {"bias": np.ones(2, np.float32)}
      >>> load_torch(linear, weights)
      >>> linear.bias[...]
      Array([1., 1.], dtype=float32)
    """
    tables = _tables(module) if rules is None else (Table("the rules given", tuple(rules)),)
    tensors = read(state_dict)
    current = [(table, table.current(tensors)) for table in tables]
    most = max(table.knows(named) for table, named in current)
    fitting = [(table, named) for table, named in current if table.knows(named) == most]
    errors = []
    for table, named in fitting:
        try:
            return nnx.update(module, to_flax(named, module, table.rules))
        except ConversionError as caught:
            errors.append(caught)
    error, (table, named) = min(zip(errors, fitting, strict=True), key=_names_and_problems)
    hint = _hint(module, named, table) or _without_biases(error, named)
    if hint:  # which explains more than what single tensors may be
        error.suggestions = ()
    raise ConversionError(**vars(error) | {"hint": hint})


def to_torch(
    module: nnx.Module, rules: Iterable[Rule] | None = None, *, names: str | None = None
) -> dict[str, np.ndarray]:
    """The parameters of a Flax module under PyTorch's names: what `load_torch` takes.

    `torch.from_numpy` makes each a tensor; of bfloat16, which NumPy does not have,
    `torch.from_numpy(array.view("int16")).view(torch.bfloat16)`.

    Args:
      module: as for `load_torch`.
      rules: a weight table of your own; by default that of the module's class.
      names: which of the class's tables, such as `"torch.nn.MultiheadAttention"`; None: the first.

    Returns:
      Name → array, each in the dtype of its parameter.

    Raises:
      ConversionError: (a ValueError) parameters that the names cannot hold.
      TypeError: the class has no table and there are no rules.
      ValueError: the class has no table of these names.

    Example:
      >>> from jattn import nn
      >>> attention = nn.SelfAttention(3, 4, use_bias=False, rngs=nnx.Rngs(0))
      >>> {name: array.shape for name, array in to_torch(attention).items()}
      {'W_k.weight': (4, 3), 'W_q.weight': (4, 3), 'W_v.weight': (4, 3)}
    """
    if rules is not None:
        return from_flax(module, rules)
    return part_to_torch(module, nnx.state(module, nnx.Param), names=names)


def part_to_torch(
    module: nnx.Module, state: nnx.State, *, names: str | None = None
) -> dict[str, np.ndarray]:
    """Some parameters of a module under PyTorch's names, as `to_torch` gives all of them.

    Args:
      module: whose class has the table.
      state: of its parameters, or of some.
      names: as for `to_torch`.

    Raises:
      As `to_torch`.
    """
    failed = []
    for table in _named(module, names):
        try:
            return from_flax(state, table.rules)
        except ConversionError as caught:
            failed.append(caught)
    wrapped = _wrapped(module)
    hint = f"{wrapped}: its weights have no name in PyTorch" if wrapped else ""
    raise ConversionError(**vars(failed[0]) | {"hint": hint})


def torch_rules(
    module: nnx.Module | type[nnx.Module], names: str | None = None
) -> tuple[Rule, ...]:
    """The weight table of a module's class, to build one's own of with `within`.

    Args:
      module: a module, or its class.
      names: which of the class's tables; None: the first.

    Returns:
      Its rules.

    Raises:
      TypeError: the class has no table.
      ValueError: the class has no table of these names.

    Example:
      >>> from jattn.interop import within
      >>> rules = within(torch_rules(nnx.Linear), "fc", "out")
      >>> [rule.torch for rule in rules]
      [('fc.weight',), ('fc.bias',)]
    """
    return _named(module, names)[0].rules


def names_in_torch(
    module: nnx.Module, tensors: Mapping[str, Any], rules: Iterable[Rule] | None = None
) -> dict[str, tuple[str, ...]]:
    """The names of the tensors that fill each parameter, by its path; none: these do not fill all.

    Old spellings are not known here.

    Args:
      module, rules: as for `load_torch`.
      tensors: by their names.

    Raises:
      TypeError: the class has no table and there are no rules.
    """
    paths = {
        ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    tables = _tables(module) if rules is None else (Table("the rules given", tuple(rules)),)
    for table in tables:
        steps = [Step(names(rule.torch), names(rule.flax), rule.layout) for rule in table.rules]
        found = {
            path: bound.sources
            for name in tensors
            for step in steps
            for bound in step.bound_by(name)
            if tensors.keys() >= {*bound.sources}
            for path in bound.targets
        }
        if found.keys() == paths:
            return found
    return {}


def _tables(module: nnx.Module | type[nnx.Module]) -> tuple[Table, ...]:
    cls = module if isinstance(module, type) else type(module)
    if not issubclass(cls, nnx.Module):
        raise TypeError(f"module: expected a flax.nnx.Module, got {cls.__name__}")
    for base in cls.__mro__:
        if base in TABLES:
            return TABLES[base]
    if isinstance(module, nnx.Module) and not nnx.to_flat_state(nnx.state(module, nnx.Param)):
        return (Table("no weights", ()),)
    raise TypeError(
        f"{cls.__module__}.{cls.__qualname__} has no table of PyTorch's names: pass rules"
    )


def _named(module: nnx.Module | type[nnx.Module], names: str | None) -> list[Table]:
    """The tables of these names: several where the weights decide, as kdim and vdim do."""
    tables = _tables(module)
    found = [table for table in tables if table.names == (names or tables[0].names)]
    if not found:
        expected = ", ".join(repr(each) for each in dict.fromkeys(table.names for table in tables))
        raise ValueError(f"names: expected one of {expected}, got {names!r}")
    return found


def _hint(module: nnx.Module, tensors: Iterable[str], tried: Table) -> str:
    """What explains weights that do not fit: a wrapper, a prefix, or names of another table."""
    if wrapped := _wrapped(module):
        return f"{wrapped}: load the weights first, then wrap it"
    tensors = list(tensors)
    if tried.knows(tensors) == len(tensors):
        return ""
    inner = [name.partition(".")[2] for name in tensors]
    if len({name.partition(".")[0] for name in tensors}) == 1 and tried.knows(inner) == len(inner):
        return f"these names fit without {tensors[0].partition('.')[0]!r} and its dot before them"
    own = [cls for cls in type(module).__mro__ if cls in TABLES]
    fitting = [
        f"{cls.__name__} ({table.names})"
        for cls in dict.fromkeys(itertools.chain(own, TABLES))
        for table in TABLES[cls]
        if table.knows(tensors) == len(tensors)
    ]
    return f"these names fit {', or '.join(fitting[:3])}" if fitting else ""


def _names_and_problems(tried: tuple[ConversionError, Any]) -> tuple[int, int]:
    """How many names do not fit, and how many problems there are in all."""
    error, _ = tried
    names = len(error.missing) + len(error.unused)
    return names, names + len(error.ambiguous) + len(error.unfit)


def _without_biases(error: ConversionError, tensors: Iterable[str]) -> str:
    only_biases = error.missing and all("bias" in name for name in error.missing)
    if not only_biases or error.unused or error.unfit or any("bias" in name for name in tensors):
        return ""
    return "the weights have no biases: use_bias=False makes a module that has none either"


def _wrapped(module: nnx.Module) -> str:
    """The outermost layer of Flax that wraps another and keeps weights of its own beside it."""
    wrappers = [
        (path, type(inner).__name__)
        for path, inner in nnx.iter_modules(module)
        if isinstance(inner, nnx.LoRA | nnx.LoRALinear | nnx.WeightNorm)
    ]
    if not wrappers:
        return ""
    path, kind = min(wrappers, key=lambda each: len(each[0]))
    return f"{'.'.join(map(str, path)) or 'the module'} is a {kind}"
