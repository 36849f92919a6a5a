"""A run is a folder with checkpoints/, metrics.jsonl and pictures. It is never overwritten."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import BadInput
from experiments.training.checkpoints import Checkpoints

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """The folder of one training run, and its contents."""

    folder: Path

    @classmethod
    def create(cls, folder: Path | None, experiment: str) -> "Run":
        """A new folder: the given one, or `runs/EXPERIMENT/001`, `002`, ….

        Raises:
          BadInput: the given folder is not empty, or cannot be made.
        """
        if folder is None:
            numbers = [int(path.name) for path in _numbered(RUNS / experiment)]
            folder = RUNS / experiment / f"{max(numbers, default=0) + 1:03}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise BadInput(
                    f"{folder} holds something already: give another --run-dir,"
                    " or --resume to continue the run there"
                )
        except OSError as error:
            raise BadInput(f"{folder}: {error.strerror or error}") from None
        return cls(folder)

    @classmethod
    def open(cls, folder: Path | None, experiment: str) -> "Run":
        """The given run, or the newest one of the experiment that has a checkpoint.

        Raises:
          BadInput: there is no such run.
        """
        folders = (
            [folder]
            if folder
            else sorted(_numbered(RUNS / experiment), key=lambda path: int(path.name))
        )
        for found in reversed(folders):
            if cls(found).trained():
                return cls(found)
        raise BadInput(
            f"no checkpoint in {folder or RUNS / experiment}:"
            " train first, or give another --run-dir"
        )

    def trained(self) -> "list[Run]":
        """This run and those of its stages, in folders within it, that have a checkpoint."""
        inside = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        runs = [self, *(Run(path) for path in inside if path.is_dir())]
        return [run for run in runs if run.checkpoints.steps()]

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.folder / "checkpoints")

    def write_scores(self, scores: Mapping[str, Any]) -> None:
        """Write the results of the run to `scores.json`."""
        text = json.dumps(scores, indent=2) + "\n"
        (self.folder / "scores.json").write_text(text, encoding="utf-8")

    @property
    def metrics(self) -> "Metrics":
        """The run's numbers."""
        return Metrics(self.folder / "metrics.jsonl")


def _numbered(parent: Path) -> list[Path]:
    folders = parent.iterdir() if parent.is_dir() else []
    return [path for path in folders if path.is_dir() and re.fullmatch(r"\d+", path.name)]


@dataclass(frozen=True)
class Metrics:
    """A JSON-lines file: one object per line, each with its step."""

    path: Path

    def write(self, **values: Any) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines but one that a kill cut short."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Keep the lines up to `step`: training will write the later ones again."""
        kept = [row for row in self.read() if row["step"] <= step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        self.path.write_text(text, encoding="utf-8")
