"""Exports every fixture: `python -m experiments.torch_reference [FOLDER]` (needs torch)."""

import argparse
import functools
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from experiments.torch_reference.ports import all_ports
from experiments.torch_reference.record import record
from experiments.torch_reference.training import all_trainings, train
from jattn.parity.fixtures import Fixture, save
from jattn.parity.systems import FAMILIES


def recordings() -> Mapping[str, Callable[[], Fixture]]:
    """The file of every fixture, and what records it."""
    cases = {
        case.file_name: functools.partial(record, case)
        for family in FAMILIES
        for case in _recorded(family).cases()
    }
    trainings = {each.file_name: functools.partial(train, each) for each in all_trainings()}
    return {**cases, **trainings, **all_ports()}


def _recorded(family: Any) -> Any:
    """The file here that records a family of systems has the name of that family's file."""
    name = family.__name__.rpartition(".")[2]
    return importlib.import_module(f"experiments.torch_reference.{name}")


def main() -> None:
    """Records all fixtures into a folder, in place of those of the same names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.torch_reference", description=__doc__
    )
    parser.add_argument(
        "folder", nargs="?", type=pathlib.Path, default=pathlib.Path("tests/fixtures")
    )
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    for name, recorded in recordings().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, recorded())
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
