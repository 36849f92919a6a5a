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
    """A source text, its target text, and a label, such as the language, to group results by."""

    source: str
    target: str
    label: str = ""


class Split(NamedTuple):
    """Pairs to train on, and held-out pairs to test with."""

    train: list[Pair]
    test: list[Pair]


def normalise(text: str) -> str:
    """Compose accents (Unicode NFC) and turn every run of white space into one space.

    Texts that look the same then compare equal.

    Example:
      >>> normalise(" 3 мая 1999\\u202fг. ")
      '3 мая 1999 г.'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_tsv(path: Path) -> list[Pair]:
    """Read `source<TAB>target` lines in UTF-8; blank lines, without a tab, are skipped.

    Raises:
      BadInput: the file is missing, not readable or not UTF-8, all its lines are blank, or a line
        is not two non-empty texts of at most 500 characters. One report names all bad lines by
        their numbers in the file.
    """
    lines = read_utf8(path).split("\n")
    rows = {
        number: [normalise(column) for column in line.split("\t")]
        for number, line in enumerate(lines, 1)
        if line.strip() or "\t" in line
    }
    if not rows:
        raise BadInput(f"{path}: expected lines of source<TAB>target, got an empty file")
    refuse([f"{path}:{number}: {x}" for number, row in rows.items() if (x := _problem(row))])
    return [Pair(source, target) for source, target in rows.values()]


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
      BadInput: the file is missing, not readable or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BadInput(
            f"{path}:{line}: expected UTF-8 text, got byte 0x{content[error.start]:02x}"
        ) from None


def write_utf8(path: Path, text: str) -> None:
    """Write a text to a file.

    Raises:
      BadInput: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def refuse(problems: Sequence[str]) -> None:
    """Raise one `BadInput` with the first problems and the number of others, if there are any."""
    if problems:
        left = len(problems) - SHOWN_PROBLEMS
        more = [f"… and {left} more"] if left > 0 else []
        raise BadInput("\n".join([*problems[:SHOWN_PROBLEMS], *more]))


def hold_out(keys: Iterable[str], what: str, *, fraction: float, seed: int) -> set[str]:
    """Draw a fraction of the different keys, but at least one, and leave at least one.

    Raises:
      BadInput: there are fewer than two different keys; `what` names them.
    """
    different = sorted(set(keys))
    if len(different) < 2:
        raise BadInput(
            f"expected at least 2 different {what} (one to hold out), got {len(different)}"
        )
    count = min(max(round(fraction * len(different)), 1), len(different) - 1)
    return set(random.Random(seed).sample(different, count))


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
    held_out = hold_out((pair.source for pair in pairs), "sources", fraction=fraction, seed=seed)
    return Split(*_partition(pairs, lambda pair: pair.source not in held_out))


def _partition(
    pairs: Iterable[Pair], keep: Callable[[Pair], bool]
) -> tuple[list[Pair], list[Pair]]:
    sides: tuple[list[Pair], list[Pair]] = [], []
    for pair in dict.fromkeys(pairs):
        sides[not keep(pair)].append(pair)
    return sides
