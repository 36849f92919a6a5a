"""Pairs of texts: a reader of tab-separated files, and a split into training and held-out pairs."""

import random
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import BadInput

MAX_CHARACTERS = 500
SHOWN_PROBLEMS = 10


class Pair(NamedTuple):
    """A source text, its target text, and a label (such as the language) to group results by."""

    source: str
    target: str
    label: str = ""


class Split(NamedTuple):
    """Pairs to train on, and held-out pairs to be judged by."""

    train: list[Pair]
    test: list[Pair]


def normalise(text: str) -> str:
    """Compose accents (Unicode NFC) and turn every run of white space into one space.

    So equal texts are equal.

    Example:
      >>> normalise(" 3 мая 1999\\u202fг. ")
      '3 мая 1999 г.'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_tsv(path: Path) -> list[Pair]:
    """Read `source<TAB>target` lines in UTF-8.

    Raises:
      BadInput: a file that is missing, not readable, not UTF-8 or empty, or any line that is not
        two non-empty texts of at most 500 characters. Bad lines are reported together, with their
        numbers.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BadInput(
            f"{path}:{line}: expected UTF-8 text, got byte 0x{content[error.start]:02x}"
        ) from None
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    if not lines:
        raise BadInput(f"{path}: expected lines of source<TAB>target, got an empty file")
    rows = [[normalise(column) for column in line.split("\t")] for line in lines]
    problems = [f"{path}:{i}: {found}" for i, row in enumerate(rows, 1) if (found := _problem(row))]
    if problems:
        more = (
            f"\n… and {len(problems) - SHOWN_PROBLEMS} more"
            if len(problems) > SHOWN_PROBLEMS
            else ""
        )
        raise BadInput("\n".join(problems[:SHOWN_PROBLEMS]) + more)
    return [Pair(source, target) for source, target in rows]


def _problem(row: list[str]) -> str | None:
    if len(row) != 2:
        return f"expected source<TAB>target, got {len(row) - 1} tabs"
    for name, text in zip(("source", "target"), row, strict=True):
        if not text:
            return f"expected a {name} text, got none"
        if len(text) > MAX_CHARACTERS:
            return f"expected a {name} of at most {MAX_CHARACTERS} characters, got {len(text)}"
    return None


def split(pairs: Sequence[Pair], *, fraction: float = 0.1, seed: int = 0) -> Split:
    """Hold out a fraction of the *sources*: all pairs of one source fall on the same side.

    Args:
      pairs: at least two different sources.
      fraction: of the sources, in (0, 1); at least one is held out and at least one is trained on.
      seed: the same seed gives the same split, whatever the order of the pairs.

    Raises:
      BadInput: fewer than two different sources.
    """
    sources = sorted({pair.source for pair in pairs})
    if len(sources) < 2:
        raise BadInput(
            f"expected at least 2 different sources (one to hold out), got {len(sources)}"
        )
    count = min(max(round(fraction * len(sources)), 1), len(sources) - 1)
    held_out = set(random.Random(seed).sample(sources, count))
    return Split(*_partition(pairs, lambda pair: pair.source not in held_out))


def _partition(
    pairs: Iterable[Pair], keep: Callable[[Pair], bool]
) -> tuple[list[Pair], list[Pair]]:
    sides: tuple[list[Pair], list[Pair]] = [], []
    for pair in dict.fromkeys(pairs):
        sides[not keep(pair)].append(pair)
    return sides
