"""Every system of the table, held against the numbers that PyTorch gave."""

import importlib
import operator
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.interop import from_flax, to_flax
from jattn.parity.compare import run
from jattn.parity.fixtures import load
from jattn.parity.systems import SYSTEMS, markdown

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures"
FIXTURES = sorted(FOLDER.glob("*/*.safetensors"))
every_fixture = pytest.mark.parametrize(
    "path", FIXTURES, ids=lambda path: f"{path.parent.name}/{path.stem}"
)


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
    "name",
    ["pooling/additive_lengths", "multi_head/widths_bias_lengths", "recurrent/gru_lengths_state"],
)
def test_float32_is_as_near_to_the_truth_as_pytorch(name):
    comparison = run(load(FOLDER / f"{name}.safetensors"), np.float32)
    assert comparison.passed, [row for row in comparison.rows if not row.passed]
    assert comparison.worst("torch_ratio", "output/") > 1e-3, "this was not computed in float32"


@pytest.mark.parametrize("slug", SYSTEMS)
def test_under_vmap_every_example_is_the_same(slug):
    """All inputs, lengths and ids included, get one more axis, so they are traced."""
    fixture = next(fixture for fixture in map(load, reversed(FIXTURES)) if fixture.system == slug)
    system = SYSTEMS[slug]
    with jax.enable_x64(True):
        module = shape_of(system, fixture)
        nnx.update(module, to_flax(fixture.parameters, module, system.rules_for(module)))
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
        module = shape_of(system, fixture)
        rules = system.rules_for(module)
        back = from_flax(to_flax(fixture.parameters, module, rules), rules)
    assert back.keys() == fixture.parameters.keys()
    for name, tensor in fixture.parameters.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name


def test_every_system_has_fixtures_and_every_fixture_a_system():
    assert {load(path).system for path in FIXTURES} == set(SYSTEMS)


@every_fixture
def test_a_fixture_lies_where_its_title_says(path):
    assert FOLDER / f"{load(path).title}.safetensors" == path


def test_a_slug_begins_with_the_family_that_lists_it_and_rows_only_order_them():
    for slug, system in SYSTEMS.items():
        family, _, name = slug.partition("/")
        assert slug == system.slug and name
        listed = importlib.import_module(f"jattn.parity.systems.{family}").SYSTEMS
        assert system in listed
    rows = [system.row for system in SYSTEMS.values()]
    assert rows == sorted(rows)


@pytest.mark.parametrize("slug", SYSTEMS)
def test_a_system_names_what_exists(slug):
    for name in (*SYSTEMS[slug].functions, *SYSTEMS[slug].modules):
        assert callable(operator.attrgetter(name.removeprefix("jattn."))(jattn)), name


def test_the_table_lists_each_system_and_its_fixtures():
    fixtures = [load(path) for path in FIXTURES]
    lines = markdown(fixtures).splitlines()
    assert len(lines) == 2 + len(SYSTEMS)
    for fixture in fixtures:
        (line,) = (line for line in lines if line.startswith(f"| `{fixture.system}` |"))
        assert f"`{fixture.case}`" in line
    assert all(
        system.link in line for system, line in zip(SYSTEMS.values(), lines[2:], strict=True)
    )
