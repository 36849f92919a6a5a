"""What the experiments on texts share: options, a check of the data, and a text to try."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import tyro

from experiments import BadInput
from experiments.data.pairs import MAX_CHARACTERS, normalise
from experiments.training import command
from experiments.training.checkpoints import Checkpoint

DataFile = Annotated[
    Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: those named above)")
]


@dataclass(frozen=True)
class TextSettings(command.Settings):
    """The options of a recurrent network that learns from a file of texts."""

    data: DataFile = None
    """Train on your own texts."""
    batch_size: int = 128
    """Examples in a step."""
    features: int = 128
    """Width of a layer; of a recurrent one in each direction, with embeddings of half of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        command.check_at_least(self, batch_size=1, features=1)

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Self:
        """The settings that a checkpoint was made with, its file of texts included."""
        path = Path(metadata["data"]) if metadata["data"] else None
        return cls(data=path, **metadata["settings"])

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint keeps of the settings; the file by its absolute path."""
        return {**super().metadata(), "data": self._path()}

    def check_continues(self, before: Self, folder: Path, *, finished: bool) -> None:
        """Refuse other settings than the checkpoint's.

        A resumed run may read the same texts from another file: `check_data` compares them.
        """
        super().check_continues(before, folder, finished=finished)
        if not self.resume and self._path() != before._path():
            raise BadInput(
                f"--data {self.data} differs from the checkpoint's, {before.data}, in {folder}"
            )

    def _path(self) -> str | None:
        return str(self.data.absolute()) if self.data else None

    def _kept(self) -> dict[str, Any]:
        return {name: value for name, value in super()._kept().items() if name != "data"}


def digest(data: Any) -> str:
    """A hash of the data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def check_data(data: Any, checkpoint: Checkpoint | None, what: str) -> None:
    """Refuse data that the checkpoint was not trained on; `what` names its elements."""
    if checkpoint and checkpoint.metadata["digest"] != digest(data):
        source = (
            "--data gives"
            if checkpoint.metadata["data"]
            else "--data, or another version of Python, gives"
        )
        raise BadInput(f"{source} other {what} than those that the checkpoint was trained on")


def check_utf8(name: str, text: str) -> None:
    """Refuse an option's text that no UTF-8 can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{command.option(name)} must be UTF-8 text, got other bytes") from None


def check_trained(settings: command.Settings, checkpoint: Checkpoint) -> None:
    """Warn if the model is half trained.

    Raises:
      BadInput: it is not trained at all.
    """
    if checkpoint.step == 0:
        raise BadInput(
            "the only checkpoint is of step 0, before any training:"
            " train first, or continue with --resume"
        )
    if checkpoint.step < settings.steps:
        command.warn(
            f"half trained: this is the checkpoint of step {checkpoint.step} of {settings.steps}"
        )


def asked_text(settings: TextSettings, checkpoint: Checkpoint, characters: str) -> str:
    """The text that the command line gives the trained model.

    Warnings say if the model is half trained, and which characters of the text it does not know.

    Raises:
      BadInput: the text is empty or too long, or the model is not trained.
    """
    text = normalise(settings.asked or "")
    if not 1 <= len(text) <= MAX_CHARACTERS:
        raise BadInput(
            f"--{settings.asks} must be a text of 1 to {MAX_CHARACTERS} characters, got {len(text)}"
        )
    check_trained(settings, checkpoint)
    if unknown := sorted(set(text) - set(characters)):
        command.warn(f"never seen in training: {' '.join(unknown)}")
    return text
