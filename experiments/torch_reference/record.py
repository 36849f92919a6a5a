"""Runs a reference and records all that a port needs to be held against it."""

import copy
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from experiments.torch_reference.cases import Case
from jattn.parity.fixtures import Fixture

Tensors = dict[str, torch.Tensor]


def versions() -> dict[str, str]:
    """Package → version, of all that records a fixture."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


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
    modules: Tensors = {}
    hooks = [_hook(name, child, modules) for name, child in module.named_modules() if name]
    outputs = _run(module, inputs)
    for hook in hooks:
        hook.remove()
    cotangents = {
        name: torch.from_numpy(generator.normal(size=tuple(output.shape)))
        for name, output in outputs.items()
        if output.requires_grad
    }
    parameters = dict(module.named_parameters())
    gradients = _gradients(parameters, inputs, outputs, cotangents)
    truth = {f"output/{name}": output for name, output in outputs.items()} | gradients
    return Fixture(
        system=case.system,
        case=case.name,
        arguments=case.arguments,
        seed=case.seed,
        versions=versions(),
        float32_errors=_float32_errors(copy.deepcopy(module), inputs, cotangents, _arrays(truth)),
        parameters=_arrays(parameters),
        inputs=_arrays(inputs),
        outputs=_arrays(outputs),
        modules=_arrays(modules),
        cotangents=_arrays(cotangents),
        parameter_gradients=_arrays(gradients, "grad/param/"),
        input_gradients=_arrays(gradients, "grad/input/"),
    )


def _hook(name: str, child: nn.Module, modules: Tensors) -> torch.utils.hooks.RemovableHandle:
    """Keeps a submodule's outputs as NAME[CALL], or NAME[CALL][ITEM] where it returns several."""
    calls = 0

    def keep(label: str, output: Any) -> None:
        if isinstance(output, PackedSequence):
            modules[label] = pad_packed_sequence(output, batch_first=True)[0]
        elif isinstance(output, torch.Tensor):
            modules[label] = output
        elif output is not None:  # as PyTorch's weights are where nobody needs them
            for item, part in output.items() if isinstance(output, dict) else enumerate(output):
                keep(f"{label}[{item}]", part)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal calls
        keep(f"{name}[{calls}]", output)
        calls += 1

    return child.register_forward_hook(hook)


def _run(module: nn.Module, inputs: Tensors) -> Tensors:
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    return module(**inputs)


def _gradients(
    parameters: Mapping[str, torch.Tensor], inputs: Tensors, outputs: Tensors, cotangents: Tensors
) -> Tensors:
    leaves = {f"grad/param/{name}": tensor for name, tensor in parameters.items()}
    leaves |= {
        f"grad/input/{name}": tensor for name, tensor in inputs.items() if tensor.requires_grad
    }
    if not (leaves and cotangents):
        return {}
    gradients = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        list(leaves.values()),
        list(cotangents.values()),
        materialize_grads=True,
    )
    return dict(zip(leaves, gradients, strict=True))


def _float32_errors(
    module: nn.Module, inputs: Tensors, cotangents: Tensors, truth: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Root mean square error of each output and gradient when PyTorch computes in float32."""

    def single(tensors: Tensors) -> Tensors:
        return {n: t.detach().float() if t.is_floating_point() else t for n, t in tensors.items()}

    module.float()
    inputs = single(inputs)
    outputs = _run(module, inputs)
    gradients = _gradients(dict(module.named_parameters()), inputs, outputs, single(cotangents))
    found = _arrays({f"output/{name}": output for name, output in outputs.items()} | gradients)
    return {
        name: float(np.sqrt(np.mean(np.square(found[name] - expected))))
        for name, expected in truth.items()
        if expected.dtype == np.float64
    }


def _arrays(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): tensor.detach().numpy().copy()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
