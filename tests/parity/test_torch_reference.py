"""Where torch is installed: the fixtures are what the references give today."""

import importlib
import pathlib

import numpy as np
import pytest

from jattn.parity.fixtures import load
from jattn.parity.systems import SYSTEMS

pytestmark = pytest.mark.torch
FOLDER = pathlib.Path(__file__).parents[1] / "fixtures"
FIXTURES = [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.rglob("*.safetensors"))]


@pytest.fixture(scope="module")
def recorded():
    """Sums have one order: that of one thread, as where the fixtures were recorded."""
    import torch

    from experiments.torch_reference.__main__ import recordings

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield recordings()
    torch.set_num_threads(threads)


def test_every_recording_has_a_fixture_and_every_fixture_a_recording(recorded):
    assert sorted(FIXTURES) == sorted(recorded)


@pytest.mark.parametrize("name", FIXTURES)
def test_recording_anew_changes_nothing(recorded, name):
    old, new = load(FOLDER / name), recorded[name]()
    assert (new.system, new.case, new.arguments, new.seed) == (
        old.system,
        old.case,
        old.arguments,
        old.seed,
    )
    assert new.tensors.keys() == old.tensors.keys()
    for tensor, expected in old.tensors.items():
        found = new.tensors[tensor]
        assert found.dtype == expected.dtype
        scale = np.max(np.abs(expected), initial=1.0)
        # Adam divides a gradient that is zero in theory, as a key bias has, by its own size: in
        # fifty steps the rounding of another CPU grows
        tolerance = 1e-9 if name.startswith("training/") else 1e-12
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=tensor)


def test_the_table_names_references_that_exist(recorded):
    for system in SYSTEMS.values():
        module, name = system.reference.split(".")
        assert callable(
            getattr(importlib.import_module(f"experiments.torch_reference.{module}"), name)
        )
