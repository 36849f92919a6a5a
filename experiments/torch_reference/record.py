"""Runs a reference on drawn weights and inputs, and records it."""

import numpy as np
import torch

from experiments.torch_reference.cases import Case
from jattn.parity import recording
from jattn.parity.fixtures import Fixture


def record(case: Case) -> Fixture:
    """The case in float64 with gradients, and PyTorch's own error where it computes in float32."""
    generator = np.random.default_rng(case.seed)
    module = case.reference(**case.arguments).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.from_numpy(np.array(generator.normal(scale=0.5, size=tuple(parameter.shape))))
            )
    inputs = {
        name: torch.from_numpy(generator.normal(size=given) if isinstance(given, tuple) else given)
        for name, given in case.inputs.items()
    }
    return recording.record(
        module, inputs, system=case.system, case=case.name, arguments=case.arguments,
        seed=case.seed, random=generator, inside=False, widen=False,
    )  # fmt: skip
