"""Tensors of a state dict, NumPy's or PyTorch's, as NumPy arrays."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from jattn.interop.errors import ConversionError


def read(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor as an array of the same dtype and bits; bfloat16 is that of ml_dtypes.

    A tensor of PyTorch may need gradients or lie on a device.

    Args:
      tensors: name → array or PyTorch tensor.

    Returns:
      Name → NumPy array.

    Raises:
      TypeError: no mapping of names.
      ConversionError: (a ValueError) names every tensor that is sparse, quantized, without values,
        or none at all.

    Example:
      >>> read({"bias": np.arange(3.0)[::-1]})
      {'bias': array([2., 1., 0.])}
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise TypeError(
            "the weights must be a mapping of names to tensors, such as module.state_dict(),"
            f" got {type(tensors).__name__}"
        )
    arrays, unreadable = {}, []
    for name, tensor in tensors.items():
        try:
            arrays[name] = _array(tensor)
        except ValueError as error:
            unreadable.append(f"{name}: {error}")
    if unreadable:
        raise ConversionError(unfit=unreadable)
    return arrays


def _array(tensor: Any) -> np.ndarray:
    torch = sys.modules.get("torch")  # where nobody has imported it, there is no tensor of it
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _from_torch(tensor)
    if not hasattr(tensor, "dtype"):
        raise ValueError(f"expected a tensor or an array, got {type(tensor).__name__}")
    return np.asarray(tensor)


def _from_torch(tensor: Any) -> np.ndarray:
    if tensor.is_quantized:
        raise ValueError(f"a quantized tensor ({tensor.dtype}): pass tensor.dequantize()")
    if tensor.is_meta:
        raise ValueError("a tensor on the meta device has no values")
    if str(tensor.layout) != "torch.strided":
        raise ValueError(f"a sparse tensor ({tensor.layout}): pass tensor.to_dense()")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:  # a dtype that NumPy knows by ml_dtypes alone
        name = str(tensor.dtype).removeprefix("torch.")
        try:
            dtype = np.dtype(name)
        except TypeError:
            raise ValueError(f"NumPy has no {name}") from None
        bits = {1: "uint8", 2: "int16", 4: "int32"}[tensor.element_size()]
        return tensor.view(getattr(sys.modules["torch"], bits)).numpy().view(dtype)
