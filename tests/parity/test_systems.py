"""Every row of the table, held against the numbers that PyTorch gave."""

import importlib
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from jattn.interop import to_flax, to_torch
from jattn.parity.compare import run
from jattn.parity.fixtures import load
from jattn.parity.systems import SYSTEMS, markdown

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures"
FIXTURES = sorted(FOLDER.glob("*.safetensors"))
every_fixture = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)


def shape_of(system, fixture):
    """The module without values: all of its parameters come from the fixture."""
    module = nnx.eval_shape(lambda: system.build(fixture.arguments, np.dtype(np.float64)))
    module.eval()
    return module


@every_fixture
def test_outputs_and_gradients_equal_pytorch(path):
    fixture = load(path)
    comparison = run(fixture)
    failures = [row for row in comparison.rows if not row.passed]
    assert not failures, failures
    names = {row.name for row in comparison.rows}
    assert {f"output/{name}" for name in fixture.outputs} <= names
    if fixture.cotangents:
        assert {f"grad/param/{name}" for name in fixture.parameters} <= names


@pytest.mark.parametrize(
    "name", ["05_additive_lengths", "10_widths_bias_lengths", "24_gru_lengths_state"]
)
def test_float32_is_as_near_to_the_truth_as_pytorch(name):
    comparison = run(load(FOLDER / f"{name}.safetensors"), np.float32)
    assert comparison.passed, [row for row in comparison.rows if not row.passed]
    assert comparison.worst("float32_ratio", "output/") > 1e-3, "this was not computed in float32"


@pytest.mark.parametrize("row", SYSTEMS)
def test_under_vmap_every_example_is_the_same(row):
    """All inputs, lengths and ids included, get one more axis, so they are traced."""
    fixture = next(fixture for fixture in map(load, reversed(FIXTURES)) if fixture.system == row)
    system = SYSTEMS[row]
    with jax.enable_x64(True):
        structure, shapes, *rest = nnx.split(shape_of(system, fixture), nnx.Param, ...)
        module = nnx.merge(structure, to_flax(fixture.parameters, shapes, system.rules), *rest)
        twice = {name: np.stack([array, array]) for name, array in fixture.inputs.items()}
        found = jax.jit(jax.vmap(lambda inputs: system.call(module, inputs, fixture.arguments)))(
            twice
        )
        for name, expected in fixture.outputs.items():
            tolerance = 1e-9 * np.max(np.abs(expected))
            np.testing.assert_allclose(
                found[name], [expected, expected], rtol=0, atol=tolerance, err_msg=name
            )


@every_fixture
def test_weights_travel_to_flax_and_back_bit_for_bit(path):
    fixture = load(path)
    system = SYSTEMS[fixture.system]
    with jax.enable_x64(True):
        state = to_flax(fixture.parameters, shape_of(system, fixture), system.rules)
        back = to_torch(state, system.rules)
    assert back.keys() == fixture.parameters.keys()
    for name, tensor in fixture.parameters.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name


def test_every_row_has_fixtures_and_every_fixture_a_row():
    assert {load(path).system for path in FIXTURES} == set(SYSTEMS)


@pytest.mark.parametrize("row", SYSTEMS)
def test_a_row_names_what_exists(row):
    for name in (*SYSTEMS[row].functions, *SYSTEMS[row].modules):
        module, _, attribute = name.rpartition(".")
        if module in ("jattn.scores", "jattn.masks", "jattn.heads", "jattn.positions"):
            assert callable(
                getattr(getattr(importlib.import_module("jattn"), module.split(".")[1]), attribute)
            )
        else:
            assert callable(getattr(importlib.import_module(module), attribute))


def test_the_table_lists_each_row_and_its_fixtures():
    titles = [load(path).title for path in FIXTURES]
    lines = markdown(titles).splitlines()
    assert len(lines) == 2 + len(SYSTEMS)
    for title in titles:
        row, case = title.split("/")
        assert any(line.startswith(f"| {row} |") and f"`{case}`" in line for line in lines)
    assert all(
        system.link in line for system, line in zip(SYSTEMS.values(), lines[2:], strict=True)
    )
