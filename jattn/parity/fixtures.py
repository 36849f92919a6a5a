"""Fixtures: a PyTorch module's inputs and outputs, in one safetensors file that needs no torch."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

Tensors = dict[str, np.ndarray]

_GROUPS = {
    "parameters": "param/",
    "inputs": "input/",
    "outputs": "output/",
    "buffers": "buffer/",
    "modules": "module/",
    "module_inputs": "module_input/",
    "module_gradients": "module_gradient/",
    "cotangents": "cotangent/",
    "parameter_gradients": "grad/param/",
    "input_gradients": "grad/input/",
}
_FACTS = {
    "system": str,
    "case": str,
    "arguments": dict,
    "seed": int,
    "versions": dict,
    "float32_errors": dict,
    "bfloat16_errors": dict,
}
_ORDER = "order"
_LATER = {_ORDER, "bfloat16_errors"}  # facts that older fixtures do not have


class FixtureError(ValueError):
    """A file that is no fixture: names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One run of a PyTorch module in float64, with all that is needed to repeat it elsewhere.

    Args:
      system: slug of the system, `"family/system"`.
      case: name of the case within the family.
      arguments: arguments that the module was built with.
      seed: seed of the parameters, inputs and cotangents.
      versions: package → version that recorded it.
      float32_errors: PyTorch's own error in float32 against this float64 truth: tensor → root mean
        square.
      bfloat16_errors: the same in bfloat16, of weights and inputs that were rounded to it; none
        where PyTorch cannot compute it.
      parameters: every parameter, under its PyTorch name.
      buffers: its floating buffers, such as running means; or none.
      inputs: every input; floating ones in float64, integers and booleans as they are.
      outputs: every output.
      modules: every submodule's output, as `NAME[CALL]`, and `NAME[CALL][ITEM]` where it returns
        several.
      module_inputs: every submodule's inputs, as `NAME[CALL][PLACE]`; or none.
      module_gradients: gradients with respect to the submodules' outputs; or none.
      cotangents: for every output that has a gradient, the vector that is pulled back through it.
      parameter_gradients: gradients of Σ ⟨cotangent, output⟩ with respect to the parameters.
      input_gradients: the same with respect to the floating inputs.

    Example:
      >>> Fixture("pooling/average", "mean", outputs={"output": np.zeros(3)}).title
      'pooling/mean'
    """

    system: str
    case: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    float32_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    bfloat16_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    parameters: Tensors = dataclasses.field(default_factory=dict)
    buffers: Tensors = dataclasses.field(default_factory=dict)
    inputs: Tensors = dataclasses.field(default_factory=dict)
    outputs: Tensors = dataclasses.field(default_factory=dict)
    modules: Tensors = dataclasses.field(default_factory=dict)
    module_inputs: Tensors = dataclasses.field(default_factory=dict)
    module_gradients: Tensors = dataclasses.field(default_factory=dict)
    cotangents: Tensors = dataclasses.field(default_factory=dict)
    parameter_gradients: Tensors = dataclasses.field(default_factory=dict)
    input_gradients: Tensors = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """Family and case in a word; the file that holds it has this name in its folder."""
        return f"{self.system.split('/')[0]}/{self.case}"

    @property
    def tensors(self) -> Tensors:
        """All arrays under the keys that they have in the file.

        Example:
          >>> list(Fixture("pooling/average", "mean", outputs={"output": np.zeros(3)}).tensors)
          ['output/output']
        """
        return {
            f"{prefix}{name}": array
            for group, prefix in _GROUPS.items()
            for name, array in getattr(self, group).items()
        }


def save(path: str | os.PathLike[str], fixture: Fixture) -> None:
    """Write a fixture as one safetensors file.

    Args:
      path: the file; its folder must exist.
      fixture: what to write.

    Raises:
      FixtureError: (a ValueError) where the fixture contradicts itself.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/mean.safetensors", Fixture("pooling/average", "mean"))
      ...     load(f"{folder}/mean.safetensors").title
      'pooling/mean'
    """
    _check(str(path), fixture)
    kept: dict[str, Any] = {name: getattr(fixture, name) for name in _FACTS}
    if fixture.module_inputs:  # the order of calls, which the file's own order of names loses
        kept[_ORDER] = list(fixture.tensors)
    facts = json.dumps(kept, sort_keys=True)
    arrays = {name: np.array(array, order="C") for name, array in fixture.tensors.items()}
    pathlib.Path(path).write_bytes(safetensors.numpy.save(arrays, {"fixture": facts}))


def load(path: str | os.PathLike[str], *, max_bytes: int = 2**28) -> Fixture:
    """Read a fixture; a file that is none gives an error and nothing else.

    Args:
      path: a safetensors file as written by `save`.
      max_bytes: larger files are refused before they are read.

    Returns:
      The fixture.

    Raises:
      FileNotFoundError: where there is no such file.
      FixtureError: (a ValueError) where the file is too large, truncated, or no fixture.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such fixture: {path}")
    if (size := path.stat().st_size) > max_bytes:
        raise FixtureError(f"{path}: expected at most max_bytes = {max_bytes} bytes, got {size}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise FixtureError(f"{path}: not an intact safetensors file: {error}") from error
    facts = _read_facts(str(path), metadata)
    order = facts.pop(_ORDER, sorted(arrays))
    is_names = isinstance(order, list) and all(isinstance(name, str) for name in order)
    if not is_names or sorted(order) != sorted(arrays):
        raise FixtureError(f"{path}: metadata {_ORDER!r}: expected the names of all tensors")
    arrays = {name: arrays[name] for name in order}
    contents: dict[str, Any] = facts | _read_groups(str(path), arrays)
    fixture = Fixture(**contents)
    _check(str(path), fixture)
    return fixture


def _read_facts(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "fixture" not in metadata:
        raise FixtureError(f"{path}: expected a fixture, but its metadata has no 'fixture'")
    try:
        facts = json.loads(metadata["fixture"])
    except (json.JSONDecodeError, RecursionError) as error:
        raise FixtureError(f"{path}: its metadata is no JSON: {error}") from error
    if not isinstance(facts, dict) or facts.keys() | _LATER != _FACTS.keys() | _LATER:
        raise FixtureError(
            f"{path}: expected metadata with {', '.join(_FACTS)}, got {metadata['fixture']:.200}"
        )
    for name, kind in _FACTS.items():
        if name in _LATER:
            facts.setdefault(name, kind())
        if type(facts[name]) is not kind:
            raise FixtureError(
                f"{path}: metadata {name!r}: expected {kind.__name__}, got {facts[name]!r:.200}"
            )
    return facts


def _read_groups(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    groups: dict[str, Tensors] = {group: {} for group in _GROUPS}
    for name in arrays:
        group = next((group for group, prefix in _GROUPS.items() if name.startswith(prefix)), None)
        if group is None:
            raise FixtureError(
                f"{path}: tensor {name!r}: expected a name in {', '.join(_GROUPS.values())}"
            )
        groups[group][name.removeprefix(_GROUPS[group])] = arrays[name]
    return groups


def _check(path: str, fixture: Fixture) -> None:
    """Floats are float64; gradients and cotangents belong to tensors of the same shape."""
    for name, array in fixture.tensors.items():
        if array.dtype.kind not in "iub" and array.dtype != np.float64:
            raise FixtureError(
                f"{path}: {name}: expected float64, integers or booleans, got {array.dtype}"
            )
    pairs = (
        ("parameter_gradients", "parameters"),
        ("input_gradients", "inputs"),
        ("cotangents", "outputs"),
    )
    for group, base in pairs:
        for name, array in getattr(fixture, group).items():
            partner = getattr(fixture, base).get(name)
            if partner is None or partner.shape != array.shape:
                expected = f"one of {base}" if partner is None else f"shape {partner.shape}"
                raise FixtureError(
                    f"{path}: {_GROUPS[group]}{name} of shape {array.shape}: expected {expected}"
                )
    if fixture.cotangents and fixture.parameters.keys() != fixture.parameter_gradients.keys():
        lacking = sorted(fixture.parameters.keys() - fixture.parameter_gradients.keys())
        raise FixtureError(f"{path}: no gradient for the parameters {lacking}")
