"""Fixtures of the contract, which every kernel passes."""

import gc

import jax
import pytest

from jattn.kernels.blockwise import sizes
from tests.cases import VARIANTS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Beyond scores, masks and modifiers `decode` is slow: it has the derivatives of `dense`."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        first = item.path.name == "contract.py" and item.name.startswith("test_every_")
        if params.get("kernel") == "decode" and not first:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * (len(name.split()) > 1)) for name in VARIANTS
    ]
)
def kernel(request, monkeypatch):
    """The name of a kernel, with blocks so small that these lengths need several."""
    for name, value in VARIANTS[request.param].items():
        monkeypatch.setattr(sizes, name, value)
    return request.param.split()[0]


@pytest.fixture
def no_rank_promotion():
    """Arrays of different ranks meet only where the code says how."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def checking_leaks():
    """JAX finds leaks by Python's collector: here only among the objects that the test makes."""
    gc.freeze()
    with jax.checking_leaks():
        yield
    gc.unfreeze()
