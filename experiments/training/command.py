"""The command line of a script, and the settings of a run that it continues."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from experiments import BadInput
from experiments.training.checkpoints import Checkpoint
from experiments.training.runs import Run

Settings = TypeVar("Settings")


def option(name: str) -> str:
    """A field of the settings as it is written on the command line.

    Example:
      >>> option("run_dir")
      '--run-dir'
    """
    return f"--{name.replace('_', '-')}"


def parse(default: Settings, experiment: str, arguments: Sequence[str] | None) -> Settings:
    """The settings that a command line gives, over the default ones."""
    options: dict[str, Any] = {
        "prog": f"python -m experiments.{experiment}",
        "config": (tyro.conf.FlagCreatePairsOff,),
    }
    return tyro.cli(type(default), args=arguments, default=default, **options)


def continue_from(
    run_dir: Path | None,
    experiment: str,
    arguments: Sequence[str] | None,
    stored: Callable[[Mapping[str, Any]], Settings],
    compared: Sequence[str],
) -> tuple[Settings, Run, Checkpoint]:
    """The run to go on with, and the settings with those of its checkpoint where none were given.

    Args:
      run_dir: folder of the run; None: the newest of the experiment.
      experiment: its name, which is in the metadata of every checkpoint.
      arguments: the command line.
      stored: the metadata of a checkpoint → the settings that it was made with.
      compared: the settings that must be the checkpoint's.

    Raises:
      BadInput: no checkpoint, not one of this experiment, or a given setting is not the
        checkpoint's.
    """
    run = Run.open(run_dir, experiment)
    checkpoint = run.checkpoints.newest(say=warn)
    if checkpoint.metadata.get("experiment") != experiment:
        raise BadInput(f"{run.folder} is not a run of this experiment, {experiment}")
    before = stored(checkpoint.metadata)
    settings = parse(before, experiment, arguments)
    for name in compared:
        given, own = getattr(settings, name), getattr(before, name)
        if given != own:
            raise BadInput(
                f"{option(name)} {given} differs from the checkpoint's, {own}, in {run.folder}"
            )
    return settings, run, checkpoint


def warn(message: str) -> None:
    """Say something beside the result."""
    print(message, file=sys.stderr)
