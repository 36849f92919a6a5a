"""Run any PyTorch module in double precision and keep all that a port can be held against."""

import contextlib
import copy
import inspect
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jattn.parity.fixtures import Fixture

Tensors = dict[str, Any]


def record(
    module: Any,
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    system: str = "yours/module",
    case: str = "module",
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    random: np.random.Generator | None = None,
    inside: bool = True,
    widen: bool = True,
) -> Fixture:
    """What a `torch.nn.Module` gives for some inputs, with all gradients and every layer.

    The module runs in float64 and eval mode, as a copy: its own weights, dtype and mode stay.
    Gradients are of Σ ⟨cotangent, output⟩ with normal cotangents.

    Args:
      module: any `torch.nn.Module`.
      inputs: arrays or tensors, by the names of its `forward`, or in their order.
      system, case, arguments: what the fixture says of itself.
      seed: of the cotangents, unless `random` draws them.
      inside: whether to keep the inputs and gradients of every layer, not only its outputs.
      widen: whether to compute in float64 also what the module itself computes in a narrower type,
        as the norms of `transformers` do.

    Returns:
      A `Fixture`, which `jattn.parity.fixtures.save` writes.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      TypeError: the inputs are not those of the module.
      ValueError: it returns no tensor.

    Example:
      >>> fixture = record(torch.nn.Linear(3, 2), [np.ones((5, 3))])  # doctest: +SKIP
      >>> list(fixture.parameters), fixture.outputs["output"].shape  # doctest: +SKIP
      (['weight', 'bias'], (5, 2))
    """
    torch = _torch()
    module = copy.deepcopy(module).double().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # those that are frozen, too
    untouched = copy.deepcopy(module)  # by what the module keeps of its first call
    tensors = {name: _tensor(value) for name, value in _named_inputs(module, inputs).items()}
    layers: dict[str, Tensors] = {"modules": {}, "module_inputs": {}}
    hooks = [_hook(name, child, layers) for name, child in module.named_modules() if name]
    with _all_double() if widen else contextlib.nullcontext():
        outputs = _run(module, tensors)
    for hook in hooks:
        hook.remove()
    if not outputs:
        raise ValueError(f"a {type(module).__name__} returned no tensor")
    random = random or np.random.default_rng(seed)
    cotangents = {
        name: torch.from_numpy(np.array(random.normal(size=tuple(output.shape))))
        for name, output in outputs.items()
        if output.requires_grad
    }
    kept = layers if inside else {"modules": layers["modules"]}
    return _fixture(
        (module, untouched), tensors, outputs, cotangents, kept,
        dict(system=system, case=case, arguments=dict(arguments or {}), seed=seed),
    )  # fmt: skip


def _fixture(
    modules: tuple[Any, Any], inputs: Tensors, outputs: Tensors, cotangents: Tensors,
    layers: Mapping[str, Tensors], facts: dict[str, Any],
) -> Fixture:  # fmt: skip
    module, untouched = modules
    parameters = dict(module.named_parameters())
    inner = {}
    if "module_inputs" in layers:
        inner = {name: each for name, each in layers["modules"].items() if each.requires_grad}
    gradients = _gradients(parameters, inputs, outputs, cotangents, inner)
    of_layers = {name: gradients.pop(f"layer/{name}") for name in inner if cotangents}
    truth = {f"output/{name}": output for name, output in outputs.items()} | gradients
    return Fixture(
        **facts,
        versions=versions(),
        float32_errors=_errors("float32", untouched, inputs, cotangents, arrays(truth)),
        bfloat16_errors=_errors("bfloat16", untouched, inputs, cotangents, arrays(truth)),
        parameters=arrays(parameters),
        buffers=arrays(_buffers(module)) if "module_inputs" in layers else {},
        inputs=arrays(inputs),
        outputs=arrays(outputs),
        modules=arrays(layers["modules"]),
        module_inputs=arrays(layers.get("module_inputs", {})),
        module_gradients=arrays(of_layers),
        cotangents=arrays(cotangents),
        parameter_gradients=arrays(gradients, "grad/param/"),
        input_gradients=arrays(gradients, "grad/input/"),
    )


def _buffers(module: Any) -> Tensors:
    """The floating buffers, such as the statistics of a batch norm or the frequencies of a rope."""
    return {name: each for name, each in module.named_buffers() if each.is_floating_point()}


@contextlib.contextmanager
def _all_double() -> Iterator[None]:
    """Let PyTorch's functions take every floating dtype for float64, which is the default, too."""
    torch = _torch()
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    casts = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

    def wide(value: Any) -> Any:
        return torch.float64 if any(value is each for each in narrow) else value

    class AllDouble(torch.overrides.TorchFunctionMode):  # type: ignore[name-defined]
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), options: Any = None
        ) -> Any:
            function = torch.Tensor.double if function in casts else function
            options = {name: wide(value) for name, value in (options or {}).items()}
            return function(*map(wide, arguments), **options)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with AllDouble():
            yield
    finally:
        torch.set_default_dtype(before)


def versions() -> dict[str, str]:
    """Package → version, of all that records a fixture."""
    torch = _torch()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "this needs PyTorch: pip install 'jattn[torch]', or torch==2.13.0"
        ) from None
    return torch


def _tensor(value: Any) -> Any:
    torch = _torch()
    tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    return tensor.detach().clone().double() if tensor.is_floating_point() else tensor.clone()


def _named_inputs(module: Any, inputs: Any) -> dict[str, Any]:
    """Inputs by the names of `forward`; those of one that takes any number, by their places."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if not isinstance(inputs, Sequence):
        inputs = (inputs,)
    bound = inspect.signature(module.forward).bind(*inputs)
    if any(isinstance(value, tuple) for value in bound.arguments.values()):
        raise TypeError(f"forward{inspect.signature(module.forward)}: give inputs by their names")
    return dict(bound.arguments)


def named(output: Any, name: str = "output") -> dict[str, Any]:
    """The tensors of what a module returns: `output`, or `output[0]`, or their own names."""
    torch = _torch()
    if isinstance(output, torch.nn.utils.rnn.PackedSequence):
        return {name: torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0]}
    if isinstance(output, torch.Tensor):
        return {name: output}
    if isinstance(output, Mapping):
        each = {str(key): value for key, value in output.items()}
    elif isinstance(output, Sequence):
        each = {f"{name}[{i}]": value for i, value in enumerate(output)}
    else:
        return {}
    found: dict[str, Any] = {}
    for part, value in each.items():
        for key, tensor in named(value, part).items():
            if key in found:
                raise ValueError(f"two outputs have the name {key}: give them names of their own")
            found[key] = tensor
    return found


def _hook(name: str, child: Any, layers: Mapping[str, Tensors]) -> Any:
    """Keeps a layer's inputs and outputs as NAME[CALL], or NAME[CALL][ITEM] of several."""
    calls = 0

    def items(label: str, output: Any) -> Tensors:
        if isinstance(output, Mapping):
            output = {f"{label}[{key}]": value for key, value in output.items()}
        return named(output, label)

    def hook(_module: Any, given: Any, options: Any, output: Any) -> None:
        nonlocal calls
        label = f"{name}[{calls}]"
        layers["modules"].update(items(label, output))
        layers["module_inputs"].update(
            {
                f"{label}[{i}]": each
                for i, each in enumerate(named([*given, *options.values()]).values())
            }
        )
        calls += 1

    return child.register_forward_hook(hook, with_kwargs=True)


def _run(module: Any, inputs: Tensors) -> Tensors:
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    return named(module(**inputs))


def _gradients(
    parameters: Mapping[str, Any], inputs: Tensors, outputs: Tensors, cotangents: Tensors,
    layers: Tensors,
) -> Tensors:  # fmt: skip
    torch = _torch()
    leaves = {f"grad/param/{name}": tensor for name, tensor in parameters.items()}
    leaves |= {
        f"grad/input/{name}": tensor for name, tensor in inputs.items() if tensor.requires_grad
    }
    leaves |= {f"layer/{name}": tensor for name, tensor in layers.items()}
    if not (leaves and cotangents):
        return {}
    gradients = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        list(leaves.values()),
        list(cotangents.values()),
        materialize_grads=True,
        allow_unused=True,
    )
    return dict(zip(leaves, gradients, strict=True))


def _errors(
    dtype: str, module: Any, inputs: Tensors, cotangents: Tensors, truth: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Root mean square error of each output and gradient when PyTorch computes in a narrower type.

    None where it has no kernel for it.
    """
    torch = _torch()
    narrow = getattr(torch, dtype)

    def narrowed(tensors: Tensors) -> Tensors:
        return {
            name: tensor.detach().to(narrow) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    module, inputs = copy.deepcopy(module).to(narrow), narrowed(inputs)
    try:
        outputs = _run(module, inputs)
        parameters = dict(module.named_parameters())
        gradients = _gradients(parameters, inputs, outputs, narrowed(cotangents), {})
    except (RuntimeError, NotImplementedError):
        if dtype == "float32":
            raise
        return {}
    computed = {f"output/{name}": output for name, output in outputs.items()} | gradients
    found = arrays({name: tensor.double() for name, tensor in computed.items()})
    return {
        name: float(np.sqrt(np.mean(np.square(found[name] - expected)))) if expected.size else 0.0
        for name, expected in truth.items()
        if expected.dtype == np.float64
    }


def arrays(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors whose names begin with a prefix, as arrays of their own, without it."""
    return {
        name.removeprefix(prefix): tensor.detach().numpy().copy()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
