"""Files of tensors, written by whomever: checked as a whole before a tensor of them is read."""

import functools
import math
import pathlib
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jattn.interop import json_files
from jattn.interop.errors import FileError
from jattn.interop.tensors import Stored, read

_DTYPES: Mapping[str, Any] = MappingProxyType(
    {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
        "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16,
        "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
    }
)  # fmt: skip
_MOST_HEADER = 4 * 2**20  # bytes: tens of thousands of tensors, or a bomb
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_SAFE_TORCH = (2, 6)  # whose weights-only loader runs no code (CVE-2025-32434)


def safetensors_of(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a safetensors file; nothing but its header is read.

    Raises:
      FileError: (a ValueError) it is no safetensors file, or not a whole one; the header is too
        large, contradicts the length of the file or has a name twice; or a dtype is not known.
      OSError: it cannot be opened.

    Example:
      >>> import tempfile
      >>> import safetensors.numpy
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.safetensors")
      ...     safetensors.numpy.save_file({"bias": np.ones(2)}, path)
      ...     safetensors_of(path)["bias"].load()
      array([1., 1.])
    """
    header, start = _header(path)
    tensors = {}
    for name, said in header.items():
        if said["dtype"] not in _DTYPES:
            must = f"a dtype of {', '.join(_DTYPES)}"
            raise FileError(f"{path}: {name} must have {must}, got {said['dtype']}")
        shape, dtype = tuple(said["shape"]), np.dtype(_DTYPES[said["dtype"]])
        place = start + said["data_offsets"][0]
        load = functools.partial(_read, path, name, shape, dtype, place)
        tensors[name] = Stored(shape, dtype, load)
    return tensors


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """What the header says of each tensor, and where their bytes begin."""
    unlike = f"{path} is no safetensors file, or not a whole one"
    with path.open("rb") as file:
        size, first = path.stat().st_size, file.read(8)
        if first == b"version ":
            raise FileError(f"{unlike}: it is a pointer; `git lfs pull` fetches the file")
        length = int.from_bytes(first, "little")
        if size < 8 or length > size - 8:
            raise FileError(f"{unlike}: it has {size} bytes, and a header of {length} after 8")
        if length > _MOST_HEADER:
            raise FileError(f"{path} has a header of {length} bytes, more than {_MOST_HEADER}")
        raw = file.read(length)
    try:  # its header has the right form, and the tensors fill the rest of the file without gaps
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise FileError(f"{unlike}: {error}") from None
    header = json_files.parse(raw, path)
    header.pop("__metadata__", None)
    return header, 8 + length


def _read(
    path: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype, place: int
) -> np.ndarray:
    """One tensor, without the pages of a mapped file beside it in memory."""
    raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    with path.open("rb") as file:
        file.seek(place)
        if file.readinto(raw.data) < raw.size:
            raise FileError(f"{path} ends within {name}: it was cut while it was read")
    return raw.view(dtype).reshape(shape)


def pickled(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a `.bin`, `.pt` or `.pth`, read by PyTorch's weights-only loader alone.

    A pickle can hold any program; that loader makes tensors and containers, and runs nothing.

    Raises:
      FileError: (a ValueError) PyTorch is not installed, or older than 2.6; its loader refuses the
        file; or the file holds no state dict, or tensors larger than itself.
      ConversionError: (a ValueError) tensors are sparse or quantized.
      OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        first = file.read(4)
    if first != _ZIP and first[:1] != _PICKLE:
        raise FileError(f"{path} is no file of PyTorch's: it is neither a zip archive nor a pickle")
    found = _unpickled(path, mapped=first == _ZIP)
    tensors = found if isinstance(found, Mapping) else {}
    strange = [str(name)[:50] for name, each in tensors.items() if not hasattr(each, "layout")]
    if not tensors or strange or not all(isinstance(name, str) for name in tensors):
        got = f"a {type(found).__name__}" + (f" with {strange[0]!r}" if strange else "")
        raise FileError(f"{path} must hold a state dict, names and tensors alone, got {got}")
    size = path.stat().st_size
    claimed = sum(each.numel() * each.element_size() for each in tensors.values())
    if claimed > 4 * size:  # views that show a few bytes many times; tied tables do it once
        raise FileError(f"{path} has {size} bytes, but its tensors would have {claimed}")
    return {
        name: Stored(array.shape, array.dtype, functools.partial(np.asarray, array))
        for name, array in read(tensors).items()
    }


def _unpickled(path: pathlib.Path, *, mapped: bool) -> Any:
    instead = "or save the weights as safetensors"
    try:
        import torch
    except ImportError:
        raise FileError(
            f"{path} is a pickle, which may run any program: only PyTorch's weights-only loader "
            f"is trusted with it, and torch is not installed; install it, {instead}"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise FileError(f"{path} is a pickle, which needs torch 2.6 or newer, {instead}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of PyTorch's own storages
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of any kind, from a hostile file
        said = str(error).strip().partition("\n")[0][:200]
        refused = "PyTorch's weights-only loader does not read it"
        raise FileError(f"{path}: {refused}: {type(error).__name__}: {said}") from None
