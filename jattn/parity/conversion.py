"""The command `jattn convert`: the weights of a checkpoint under other names, read back."""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from jattn import interop
from jattn.interop.convert import names_in_torch
from jattn.interop.errors import FileError
from jattn.interop.huggingface.folder import tensors_of
from jattn.interop.orbax_files import is_orbax, load_orbax, orbax_of, orbax_within, save_orbax
from jattn.interop.rules import Rule
from jattn.interop.tensor_files import pickled, safetensors_of
from jattn.parity.console import console, table
from jattn.parity.ports import made, with_options

Rules = tuple[Rule, ...] | None
Tensors = Mapping[str, Any]

_HELP = """\
Moves the weights of a model between PyTorch's names and Flax's, and reads back what it has written.

--to flax   a folder of Orbax, for the parameters of the Flax module; with its absolute path
            nnx.update(model, ocp.StandardCheckpointer().restore(path, nnx.state(model, nnx.Param)))
--to torch  a .safetensors file of PyTorch's state dict: safetensors.torch.load_file reads it
--to hf     a folder that `transformers` loads: Llama, Mistral, Qwen2, Qwen3 or BERT"""
_EXAMPLES = """\
examples:
  jattn convert llama/ --to flax -o llama_flax
  jattn convert net.pt --to flax --module my_net.py:make -o net_flax
  jattn convert net_flax --to torch --module my_net.py:make -o net.safetensors

Exit code: 0 where it is written and read back, 2 for bad input; nothing is left half-written."""


def convert_parser() -> argparse.ArgumentParser:
    """The options of `jattn convert`."""
    parser = argparse.ArgumentParser(
        prog="jattn convert",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=pathlib.Path, metavar="CHECKPOINT",
        help="a folder of transformers, a folder of Orbax, a .safetensors file or a pickle of a"
        " state dict (for which PyTorch must be installed)",
    )  # fmt: skip
    parser.add_argument("--to", choices=("flax", "torch", "hf"), required=True)
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, metavar="FILE", required=True,
        help="what to write, a file or a folder; must not be there yet",
    )  # fmt: skip
    parser.add_argument(
        "--module", metavar="MODULE:FACTORY",
        help="such as my_package.models:make or my_file.py:make: a function that returns the Flax"
        " module; or a pair of it and {'rules': …}, for one that is not jattn's; not needed for a"
        " folder of transformers",
    )  # fmt: skip
    parser.add_argument(
        "--part", default="", metavar="PATH",
        help="where the parameters lie in a folder of Orbax that holds more, such as model",
    )  # fmt: skip
    parser.add_argument(
        "--names",
        help="which of PyTorch's names to write, for a module that has several, such as"
        " torch.nn.MultiheadAttention",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="also write the report to FILE"
    )
    return parser


@dataclasses.dataclass(frozen=True)
class Moved:
    """One parameter of the module.

    Args:
      torch: names of its tensors in PyTorch.
      torch_shape, torch_dtype: of each of them.
      flax: its path in the module.
      shape, dtype: of the parameter.
    """

    torch: tuple[str, ...]
    torch_shape: tuple[int, ...]
    torch_dtype: str
    flax: str
    shape: tuple[int, ...]
    dtype: str


def convert(options: argparse.Namespace) -> int:
    """Run `jattn convert`."""
    _check(options)
    beside = options.output.absolute().parent
    with jax.enable_x64(True), _plainly(options):  # float64 stays float64
        module, rules = _module(options)
        module, read = _read(options, module, rules)
        written = interop.to_torch(module, rules, names=options.names)
        rows = _rows(module, (read, written) if options.to == "flax" else (written,), rules)
        with tempfile.TemporaryDirectory(prefix=".jattn-", dir=beside) as unfinished:
            path = pathlib.Path(unfinished, options.output.name)
            _write(options, module, written, path)
            _check_same(module, _read_back(options, module, rules, path))
            if options.output.exists():
                raise FileExistsError(f"{options.output} exists by now")
            path.rename(options.output)
    _show(options, module, rows)
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read."""
    path, output = options.checkpoint, options.output
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} exists already")
    is_file = output.suffix == ".safetensors"
    if is_file != (options.to == "torch"):
        must = "a folder" if is_file else "a file whose name ends in .safetensors"
        raise ValueError(f"--to {options.to} writes {must}, got -o {output}")
    if options.module is None and not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json that tells its module: pass --module")
    if options.to == "flax" and is_orbax(path):
        raise ValueError(f"{path} is Flax's already")
    if options.part and not is_orbax(path) and not (path.is_dir() and orbax_within(path)):
        raise ValueError(f"--part is for folders of Orbax, and {path} is none")
    if options.names and options.to != "torch":
        raise ValueError(f"--names means nothing with --to {options.to}")
    report = options.json and options.json.resolve()
    if report and any(report.is_relative_to(each.resolve()) for each in (path, output)):
        raise ValueError(f"--json {options.json} would overwrite the checkpoint or what is written")


def _module(options: argparse.Namespace) -> tuple[Any, Rules]:
    """The module of the factory, and rules of its own; None: there are none."""
    if options.module is None:
        return None, None
    module, given = with_options(options.module, made(options.module))
    if not isinstance(module, nnx.Module):
        kind = type(module).__name__
        raise ValueError(f"{options.module}: expected a module of Flax NNX, got a {kind}")
    if statistics := nnx.to_flat_state(nnx.state(module, nnx.BatchStat)):
        lost = ", ".join(".".join(map(str, path)) for path, _ in statistics)
        raise ValueError(
            f"{options.module}: statistics are no parameters and would be lost: {lost}"
        )
    if others := ", ".join(given.keys() - {"rules"}):
        raise ValueError(f"{options.module}: {others} of a diff mean nothing to convert")
    if given and options.names:
        raise ValueError(f"--names means nothing where {options.module} gives rules")
    return module, tuple(given["rules"]) if given else None


@contextlib.contextmanager
def _plainly(options: argparse.Namespace) -> Iterator[None]:
    """A class without a table, or one that no folder can hold, is bad input here."""
    try:
        yield
    except TypeError as error:
        how = (
            f"; {options.module} may return (module, {{'rules': rules}})" if options.module else ""
        )
        raise ValueError(f"{error}{how}") from error


def _read(options: argparse.Namespace, module: Any, rules: Rules) -> tuple[Any, Tensors]:
    """The module with the checkpoint's weights, and the tensors of the checkpoint."""
    path = options.checkpoint
    if module is None:
        return interop.load_pretrained(path), tensors_of(path)
    if is_orbax(path):
        tensors = orbax_of(path)
        load_orbax(module, tensors, options.part)
    else:
        tensors = _state_dict(path)
        interop.load_torch(module, tensors, rules)
    return module, tensors


def _state_dict(path: pathlib.Path) -> dict[str, Any]:
    if path.is_dir():
        try:
            return tensors_of(path)
        except FileNotFoundError:
            if not (inside := orbax_within(path)):
                raise
        some = ", ".join(map(str, inside[-3:]))
        raise FileError(f"{path} is no checkpoint itself; those of Orbax in it are {some}")
    return safetensors_of(path) if path.suffix == ".safetensors" else pickled(path)


def _write(options: argparse.Namespace, module: Any, tensors: Tensors, path: pathlib.Path) -> None:
    if options.to == "flax":
        save_orbax(module, path)
    elif options.to == "hf":
        interop.save_pretrained(module, path)
    else:
        # safetensors writes an array with other strides wrong, without a word
        whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
        safetensors.numpy.save_file(whole, path, metadata={"format": "pt"})


def _read_back(options: argparse.Namespace, module: Any, rules: Rules, path: pathlib.Path) -> Any:
    """A module like the given one, with the weights that were written."""
    if options.to == "hf":
        return interop.load_pretrained(path, type(module))
    copy = nnx.clone(module)
    nnx.update(copy, jax.tree.map(jnp.zeros_like, nnx.state(copy, nnx.Param)))
    if options.to == "flax":
        load_orbax(copy, orbax_of(path))
    else:
        interop.load_torch(copy, safetensors_of(path), rules)
    return copy


def _check_same(module: Any, copy: Any) -> None:
    """Every parameter must have the same bits."""
    pairs = zip(_parameters(module).items(), _parameters(copy).values(), strict=True)
    differing = [
        path
        for (path, one), other in pairs
        if one.dtype != other.dtype or one.tobytes() != other.tobytes()
    ]
    if differing:
        raise ValueError(f"what was written reads back otherwise: {', '.join(differing)}")


def _parameters(module: Any) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def _rows(module: Any, known: Sequence[Tensors], rules: Rules) -> list[Moved]:
    """Each parameter with its names in PyTorch, those of the first tensors that fill them all."""
    for tensors in known:
        if names := names_in_torch(module, tensors, rules):
            break
    return [
        Moved(
            names[path], tuple(tensors[names[path][0]].shape), str(tensors[names[path][0]].dtype),
            path, parameter.shape, str(parameter.dtype),
        )
        for path, parameter in _parameters(module).items()
    ]  # fmt: skip


def _show(options: argparse.Namespace, module: Any, rows: list[Moved]) -> None:
    """The report: parameters of repeated layers, which differ by a number, in one line."""
    alike: dict[Any, list[Moved]] = {}
    for row in rows:
        numbered = [_numbered(name) for name in (*row.torch, row.flax)]
        form = row.torch_shape, row.torch_dtype, row.shape, row.dtype
        alike.setdefault((*numbered, *form), []).append(row)
    titles = "PyTorch", "Flax", "in PyTorch", "in Flax", "dtype", "times"
    lines = []
    for first, *more in alike.values():
        torch, flax = " + ".join(first.torch), first.flax
        if more:
            torch, flax = _numbered(torch), _numbered(flax)
        dtype = " → ".join(dict.fromkeys([first.torch_dtype, first.dtype]))
        shapes = (" × ".join(map(str, shape)) for shape in (first.torch_shape, first.shape))
        lines.append([torch, flax, *shapes, dtype, str(len(more) + 1)])
    out = console()
    out.print(table(titles, lines, names=2))
    many = sum(math.prod(row.shape) for row in rows)
    kind, n = type(module).__name__, len(rows)
    out.print(f"{kind}: {n} parameters, {many:,} numbers, from {options.checkpoint}")
    out.print(f"written to {options.output} and read back: the same bits")
    if left := _beside(options):
        out.print(f"not copied, for they are no weights: {', '.join(left)}")
    if options.json:
        report = {
            "checkpoint": str(options.checkpoint), "output": str(options.output),
            "to": options.to, "module": kind, "parameters": list(map(dataclasses.asdict, rows)),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _beside(options: argparse.Namespace) -> list[str]:
    """Files of a folder of `transformers` that one more such folder needs: the tokenizer's."""
    if options.to != "hf" or not (options.checkpoint / "config.json").is_file():
        return []
    ours = (".safetensors", ".bin", ".index.json")
    names = sorted(path.name for path in options.checkpoint.iterdir() if path.is_file())
    written = {path.name for path in options.output.iterdir()}
    return [name for name in names if name not in written and not name.endswith(ours)]


def _numbered(name: str) -> str:
    """A name in which each number between dots is an asterisk."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)
