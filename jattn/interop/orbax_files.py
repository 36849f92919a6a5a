"""Checkpoints of Orbax: the parameters of Flax modules by their paths."""

import contextlib
import functools
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jattn.interop.errors import ConversionError, FileError
from jattn.interop.rules import Rule, to_flax
from jattn.interop.tensors import Stored

_TREE = "_METADATA"  # the file that lists the arrays of a checkpoint


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a folder holds a pytree that Orbax has saved."""
    return (path / _TREE).is_file()


def orbax_within(path: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a folder that is none itself, as a manager of several keeps them."""
    depths = ("*", "*/*", "*/*/*")
    return sorted(each.parent for depth in depths for each in path.glob(f"{depth}/{_TREE}"))


def orbax_of(path: pathlib.Path) -> dict[str, Stored]:
    """The arrays of a checkpoint by their dotted paths; none is read before it is needed.

    It may hold a `nnx.State`, its pure dict, or any other pytree.

    Raises:
      FileError: (a ValueError) it is no checkpoint, or a broken one.

    Example:
      >>> import tempfile
      >>> linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "linear")
      ...     save_orbax(linear, path)
      ...     {name: tensor.shape for name, tensor in orbax_of(path).items()}
      {'bias.value': (2,), 'kernel.value': (3, 2)}
    """
    if not is_orbax(path):
        raise FileError(f"{path} is no checkpoint of Orbax")
    import orbax.checkpoint as ocp

    with _naming(path), ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(path.absolute()).item_metadata
    if found is None:
        raise FileError(f"{path}: Orbax does not read it: its list of arrays is broken")
    leaves, structure = jax.tree.flatten(found.tree)

    def array(place: int) -> np.ndarray:
        others: list[Any] = [ocp.PLACEHOLDER] * len(leaves)  # which Orbax does not read
        others[place] = leaves[place]
        item = jax.tree.unflatten(structure, others)
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found.tree)
        asked = ocp.args.PyTreeRestore(item=item, restore_args=kinds)
        with _naming(path), ocp.PyTreeCheckpointer() as checkpointer:
            return np.asarray(jax.tree.leaves(checkpointer.restore(path.absolute(), asked))[place])

    def stored(place: int, leaf: Any) -> Stored:
        dtype = np.dtype(getattr(leaf, "dtype", None) or object)
        return Stored(tuple(getattr(leaf, "shape", ())), dtype, functools.partial(array, place))

    names = _by_path(found.tree)
    return {name: stored(place, leaf) for place, (name, leaf) in enumerate(names.items())}


def save_orbax(module: nnx.Module, path: pathlib.Path) -> None:
    """Write the parameters of a module as a checkpoint, which Orbax restores into their state.

    Raises:
      FileExistsError: there is something at the path.
    """
    import orbax.checkpoint as ocp

    if path.exists():
        raise FileExistsError(f"{path} exists already")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), nnx.state(module, nnx.Param))


def load_orbax(module: nnx.Module, tensors: Mapping[str, Any], part: str = "") -> None:
    """Fill the parameters of a module from arrays under their paths, in place.

    Args:
      module: of Flax NNX.
      tensors: of `orbax_of`.
      part: where in them the module's lie, such as `"model"`.

    Raises:
      ConversionError: (a ValueError) all that is missing, unused or unfit.
      ValueError: nothing lies in this part.
    """
    own, others = (_paths(module, kind) for kind in (nnx.Param, nnx.RngState))
    inside = _part(tensors, part, {*own, *others})
    if not inside:
        first = ", ".join(dict.fromkeys(name.partition(".")[0] for name in tensors))
        raise ValueError(f"expected a part of the checkpoint, such as {first}, got {part!r}")
    # Streams of random numbers are no weights
    weights = {name: tensor for name, tensor in inside.items() if name not in others}
    try:
        nnx.update(module, to_flax(weights, module, [Rule(name, name) for name in own]))
    except ConversionError as error:
        raise ConversionError(**vars(error) | {"hint": _hint(tensors, own)}) from None


def _part(tensors: Mapping[str, Any], part: str, known: Collection[str]) -> dict[str, Any]:
    """What lies in a part, by the paths there; the `value` that Orbax adds to a variable's goes."""
    prefix = f"{part}." if part else ""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            path = name.removeprefix(prefix)
            path = path if path in known else path.removesuffix(".value")
            if path in found:
                raise FileError(f"the checkpoint has two arrays of the path {path}")
            found[path] = tensor
    return found


def _hint(tensors: Mapping[str, Any], own: Sequence[str]) -> str:
    """The parts that hold every parameter, as a training state holds the model's."""
    ends = tuple(f".{own[0]}{end}" for end in ("", ".value")) if own else ()
    parts = {
        name.removesuffix(".value").removesuffix(f".{own[0]}")
        for name in tensors
        if name.endswith(ends)
    }
    fitting = sorted(part for part in parts if {*own} <= _part(tensors, part, own).keys())
    return f"arrays of these names are in the part {', or '.join(fitting)}" if fitting else ""


def _paths(module: nnx.Module, kind: Any) -> list[str]:
    state = nnx.to_flat_state(nnx.state(module, kind))
    return [".".join(map(str, path)) for path, _ in state]


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted paths; keys that are paths themselves may join them by slashes."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")
        if name in found:
            raise FileError(f"the checkpoint has two arrays of the path {name}")
        found[name] = leaf
    return found


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Let whatever Orbax and TensorStore raise on a broken checkpoint name it."""
    try:
        yield
    except Exception as error:  # of many kinds
        said = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        raise FileError(f"{path}: Orbax does not read it: {said}") from None
