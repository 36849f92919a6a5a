"""Checkpoints that are complete or absent.

Orbax writes each under a temporary name and then renames it; a digest detects later damage.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from experiments import BadInput


@dataclass(frozen=True)
class Checkpoint:
    """One intact checkpoint: the step, every array of the state by its path, and the metadata."""

    step: int
    arrays: Mapping[str, np.ndarray]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run; saving one deletes all but the newest `keep`."""

    folder: Path
    keep: int = 3

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, intact or not."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def save(self, step: int, state: nnx.State, metadata: Mapping[str, Any]) -> None:
        """Write a checkpoint and wait until it is on the disk."""
        arrays = {path: np.asarray(_plain(value)) for path, value in _leaves(state)}
        saved = {"metadata": dict(metadata), "digest": _digest(arrays)}
        with self._manager(create=True) as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), saved=ocp.args.JsonSave(saved)
                ),
            )

    def newest(self, *, say: Any = print) -> Checkpoint:
        """The newest intact checkpoint; `say` reports damaged ones, which stay where they are.

        Raises:
          BadInput: there is no checkpoint, or none is intact.
        """
        steps = self.steps()
        if not steps:
            raise BadInput(f"no checkpoint in {self.folder}")
        for step in reversed(steps):
            try:
                return self._load(step)
            except Exception as error:  # Orbax and TensorStore raise many kinds on a damaged file
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                say(
                    f"checkpoint {self.folder / str(step)} is damaged ({reason});"
                    " trying an earlier one"
                )
        raise BadInput(f"no intact checkpoint in {self.folder}: steps {steps} are all damaged")

    def set_aside(self, after: int) -> None:
        """Move the (damaged) checkpoints after a step to `damaged`; training writes them anew."""
        for step in self.steps():
            if step > after:
                target = self.folder.parent / "damaged"
                target.mkdir(exist_ok=True)
                name = next(
                    name for i in range(1000) if not (name := target / f"{step}-{i}").exists()
                )
                shutil.move(self.folder / str(step), name)

    def _load(self, step: int) -> Checkpoint:
        with self._manager(create=False) as manager:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(), saved=ocp.args.JsonRestore()
                ),
            )
        arrays = {path: np.asarray(array) for path, array in restored.state.items()}
        if _digest(arrays) != restored.saved["digest"]:
            raise ValueError("its numbers differ from those that were saved")
        return Checkpoint(step, arrays, restored.saved["metadata"])

    def _manager(self, *, create: bool) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, create=create, enable_async_checkpointing=False
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "saved": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(
            self.folder.absolute(), options=options, item_handlers=handlers
        )


def fill(state: nnx.State, arrays: Mapping[str, np.ndarray]) -> nnx.State:
    """The state with every array replaced by the one of the same path.

    Raises:
      BadInput: paths or shapes differ; the message names all of them.
    """
    leaves = dict(_leaves(state))
    wrong = sorted(leaves.keys() ^ arrays.keys())
    wrong += [
        path
        for path in leaves.keys() & arrays.keys()
        if _plain(leaves[path]).shape != arrays[path].shape
    ]
    if wrong:
        raise BadInput(
            f"the checkpoint does not fit the model and its optimizer, which differ in {wrong}"
        )
    filled = iter([_like(value, arrays[path]) for path, value in _leaves(state)])
    return jax.tree.map(lambda _: next(filled), state)


def restore(model: nnx.Module, checkpoint: Checkpoint) -> None:
    """Give a model the weights of a training checkpoint; ignore the optimizer's state."""
    model_path = "0/"  # the loop saves (model, optimizer)
    arrays = {
        path: array for path, array in checkpoint.arrays.items() if path.startswith(model_path)
    }
    filled = fill(nnx.state((model,)), arrays)
    nnx.update((model,), filled)


def _leaves(state: nnx.State) -> Iterator[tuple[str, jax.Array]]:
    for path, value in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), value


def _plain(value: jax.Array) -> jax.Array:
    """The data of a random key; any other array as it is."""
    return (
        jax.random.key_data(value)
        if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
        else value
    )


def _like(value: jax.Array, array: np.ndarray) -> jax.Array:
    if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=jax.random.key_impl(value))
    return jax.numpy.asarray(array, value.dtype)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for path in sorted(arrays):
        array = arrays[path]
        digest.update(
            f"{path} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes()
        )
    return digest.hexdigest()
