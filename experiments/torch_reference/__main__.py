"""Exports every fixture: `python -m experiments.torch_reference [FOLDER]` (needs torch)."""

import argparse
import pathlib

import torch

from experiments.torch_reference.cases import all_cases
from experiments.torch_reference.record import record
from jattn.parity.fixtures import save


def main() -> None:
    """Records all cases into a folder, in place of the fixtures of the same names."""
    parser = argparse.ArgumentParser(prog="python -m experiments.torch_reference", description=__doc__)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=pathlib.Path("tests/fixtures"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for case in all_cases():
        save(folder / case.file_name, record(case))
        print(f"{folder / case.file_name}  {(folder / case.file_name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
