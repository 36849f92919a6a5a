"""Tests run with strict dtype promotion, warnings as errors, and eight CPU devices for sharding.

The compiler is most of the time that the tests take, so it is asked for little optimisation: of the
same operations.
"""

import gc
import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # The old emitters compile in a third of the time; later versions do not have them
    + " --xla_cpu_use_fusion_emitters=false"
    * version("jaxlib").startswith("0.10."),
)

import jax
import numpy as np
import pytest

import jattn  # noqa: F401  before doctests are collected: pytest would load a module a second time under its name

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def promotion(request):
    """The README mixes integers and floats, as users do."""
    with jax.numpy_dtype_promotion("standard" if request.node.name == "README.md" else "strict"):
        yield


def pytest_collection_finish():
    """Spare Python's collector the modules and tests, which stay."""
    gc.freeze()
