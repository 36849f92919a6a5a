"""Tensors of a state dict, NumPy's or PyTorch's, as NumPy arrays."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jattn.interop.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file, which is read when it is needed, and only then.

    Args:
      shape, dtype: of the array.
      load: reads it.

    Example:
      >>> zeros = Stored((2,), np.dtype("float32"), functools.partial(np.zeros, 2, "float32"))
      >>> zeros.astype("float16").load()
      array([0., 0.], dtype=float16)
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    def astype(self, dtype: Any) -> "Stored":
        """The same tensor, rounded to a dtype when it is read."""
        return Stored(self.shape, np.dtype(dtype), functools.partial(_rounded, self.load, dtype))

    def watched(self, see: Callable[[np.ndarray], None]) -> "Stored":
        """The same tensor, which is shown to a function when it is read."""
        return dataclasses.replace(self, load=functools.partial(_seen, self.load, see))


def _rounded(load: Callable[[], np.ndarray], dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # who watches the result sees the infinity
        return load().astype(dtype, copy=False)


def _seen(load: Callable[[], np.ndarray], see: Callable[[np.ndarray], None]) -> np.ndarray:
    array = load()
    see(array)
    return array


def read(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor as an array of the same dtype and bits; bfloat16 is that of ml_dtypes.

    A tensor of PyTorch may need gradients or lie on a device. One of a file stays `Stored`.

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
    arrays: dict[str, Any] = {}
    unreadable = []
    for name, tensor in tensors.items():
        try:
            arrays[name] = tensor if isinstance(tensor, Stored) else _array(tensor)
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
