"""Labelled texts: a reader of CSV and TSV files, and a split into training and held-out texts."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from experiments import BadInput
from experiments.data.pairs import (
    MAX_CHARACTERS,
    SHOWN_PROBLEMS,
    hold_out,
    normalise,
    read_utf8,
    refuse,
)


class Text(NamedTuple):
    """A text, its label, and its group; a split keeps all texts of a group on one side."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Labels:
    """Labels, numbered from 0.

    Example:
      >>> Labels(("da", "nb")).encode("nb")
      [1]
    """

    names: tuple[str, ...]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each label."""
        return {label: i for i, label in enumerate(self.names)}

    def encode(self, label: str) -> list[int]:
        """A label as one token."""
        return [self.numbers[label]]


class Split(NamedTuple):
    """Texts to train on, held-out texts to test with, and how many texts were left out.

    A text is left out if several labels share it.
    """

    train: list[Text]
    test: list[Text]
    ambiguous: int


def read_table(path: Path, *, text_column: str, label_column: str) -> list[Text]:
    """Read a table with a header: comma-separated, or tab-separated if the name ends in `.tsv`.

    Each text is a group of its own.

    Raises:
      BadInput: the file is missing, not readable, not UTF-8 or empty; it lacks one of the
        columns; or a line lacks a text or a label, or its text is too long. One report names all
        bad lines by number.
    """
    content = read_utf8(path)
    tab = path.suffix.lower() == ".tsv"
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
    table = csv.DictReader(io.StringIO(content, newline=""), **options)
    texts, problems = [], []
    try:
        for name, column in (("--text-column", text_column), ("--label-column", label_column)):
            if table.fieldnames and column not in table.fieldnames:
                raise BadInput(
                    f"{path}: there is no column {column!r} ({name}),"
                    f" only {', '.join(table.fieldnames)}"
                )
        for row in table:
            text, label = (normalise(row[column] or "") for column in (text_column, label_column))
            if problem := _problem(text, label, surplus=None in row):
                problems.append(f"{path}:{table.line_num}: {problem}")
            texts.append(Text(text, label, text))
    except csv.Error as error:
        raise BadInput(f"{path}:{table.line_num}: {error}") from None
    refuse(problems)
    if not texts:
        raise BadInput(
            f"{path}: expected a header and lines of texts with labels, got no such line"
        )
    return texts


def _problem(text: str, label: str, *, surplus: bool) -> str | None:
    if surplus:
        return "expected as many columns as the header has, got more"
    for name, found in (("text", text), ("label", label)):
        if not found:
            return f"expected a text and a label, got no {name}"
    if len(text) > MAX_CHARACTERS:
        return f"expected a text of at most {MAX_CHARACTERS} characters, got {len(text)}"
    return None


def split(texts: Sequence[Text], *, fraction: float, seed: int) -> Split:
    """Hold out a fraction of the *groups*; leave out every text that several labels share.

    No single answer to such a text is right. A held-out text is not tested if training has the
    same text in another group.

    Args:
      texts: of at least two groups.
      fraction: of the groups, in (0, 1); at least one is held out and at least one is trained on.
      seed: the same seed gives the same split, whatever the order of the texts.

    Raises:
      BadInput: fewer than two groups, no text left to test, fewer than two labels to train on, or a
        label that only the held-out texts have.

    Example:
      >>> names = {"Prag": "da", "Praga": "it", "Rom": "da", "Roma": "it"}
      >>> texts = [Text(name, label, name[0]) for name, label in names.items()]
      >>> train, test, ambiguous = split([*texts, Text("Rom", "de", "R")], fraction=0.5, seed=0)
      >>> [text.text for text in train], [text.text for text in test], ambiguous
      (['Prag', 'Praga'], ['Roma'], 1)
    """
    held_out = hold_out((text.group for text in texts), "texts", fraction=fraction, seed=seed)
    labels = defaultdict(set)
    for text in texts:
        labels[text.text].add(text.label)
    clear = sorted(text for text in set(texts) if len(labels[text.text]) == 1)
    train = [text for text in clear if text.group not in held_out]
    known = {text.text for text in train}
    new = {text.text: text for text in clear if text.group in held_out and text.text not in known}
    test = list(new.values())
    _check(train, test)
    return Split(train, test, ambiguous=len(labels) - len({text.text for text in clear}))


def _check(train: Sequence[Text], test: Sequence[Text]) -> None:
    known = {text.label for text in train}
    if len(known) < 2:
        raise BadInput(f"expected texts of at least 2 labels to train on, got {len(known)}")
    if not test:
        raise BadInput(
            "no held-out text can be tested: each has several labels or is also a training text"
        )
    if unseen := sorted({text.label for text in test} - known):
        shown = ", ".join(map(repr, unseen[:SHOWN_PROBLEMS])) + (
            " …" if len(unseen) > SHOWN_PROBLEMS else ""
        )
        raise BadInput(
            f"only held-out texts have the label {shown}: give more texts of it, or another --seed"
        )
