"""Documents to learn a language from: the Python documentation that comes with Python, or a file.

A document is a sequence of paragraphs. Parts of documents are held out whole, and no paragraph
stands in two parts.
"""

import random
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from experiments import BadInput
from experiments.data.pairs import read_utf8

Document = tuple[str, ...]
RULE = re.compile(r"[*=~^#+|\s-]{3,}")
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[\"“«(\[]?(\w))")
SECTION = 1500  # characters of a section, at least


class Parts(NamedTuple):
    """Documents to train on, to choose settings with, and to report on."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]


def python_documentation() -> list[Document]:
    """The topics that `help()` of this Python knows, without paragraphs that come again."""
    from pydoc_data import topics

    return without_repeats(map(paragraphs, topics.topics.values()))


def read_documents(path: Path) -> list[Document]:
    """The text of a file in UTF-8 as one document; blank lines end a paragraph.

    Raises:
      BadInput: the file is missing, not readable, not UTF-8, or empty.
    """
    found = without_repeats([paragraphs(read_utf8(path))])
    if not found:
        raise BadInput(f"{path}: expected paragraphs of text, got an empty file")
    return found


def paragraphs(text: str) -> Document:
    """The paragraphs of a text, between blank lines.

    One that begins at the margin becomes one line; an indented one, such as a program, keeps its
    lines. Underlines of headings and rules of tables are left out.

    Example:
      >>> paragraphs("Loops\\n*****\\n\\nA loop\\nruns.\\n\\n   while x:\\n       x -= 1\\n")
      ('Loops', 'A loop runs.', '   while x:\\n       x -= 1')
    """
    found = []
    for block in re.split(r"\n\s*\n", "\n".join(text.expandtabs().splitlines())):
        lines = [line.rstrip() for line in block.split("\n")]
        lines = [line for line in lines if line and not RULE.fullmatch(line.strip())]
        if lines:
            is_program = lines[0].startswith(" ")
            found.append("\n".join(lines) if is_program else " ".join(map(str.strip, lines)))
    return tuple(found)


def without_repeats(documents: Iterable[Document]) -> list[Document]:
    """The documents without the paragraphs that stood before, and without those left empty.

    Example:
      >>> without_repeats([("a b", "c"), ("c",), ("a  b", "d")])
      [('a b', 'c'), ('d',)]
    """
    seen: set[str] = set()
    kept = []
    for document in documents:
        new = []
        for paragraph in document:
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                new.append(paragraph)
        kept.append(tuple(new))
    return [document for document in kept if document]


def split(documents: Sequence[Document], *, seed: int, fraction: float = 0.1) -> Parts:
    """Hold out two fractions of the sections; a section is some consecutive paragraphs.

    The sections that are left between held-out ones stay documents of their own.

    Args:
      documents: without repeats.
      seed: the same seed gives the same parts.
      fraction: of the sections, each for validation and test, at least one.

    Raises:
      BadInput: there are fewer than three sections.
    """
    sections = [section for document in documents for section in cut(document)]
    if len(sections) < 3:
        raise BadInput(
            f"expected a text of at least 3 sections of {SECTION} characters, to train, to validate"
            f" and to test, got {len(sections)}: blank lines part the paragraphs of a section"
        )
    held_out = max(1, round(fraction * len(sections)))
    order = random.Random(seed).sample(range(len(sections)), len(sections))
    ends = 0, held_out, 2 * held_out, len(order)
    test, validation, train = (
        [sections[i] for i in sorted(order[start:end])] for start, end in pairwise(ends)
    )
    return Parts(train, validation, test)


def cut(document: Document) -> list[Document]:
    """Consecutive paragraphs of at least `SECTION` characters; what is left goes to the last."""
    sections: list[list[str]] = [[]]
    for paragraph in document:
        if sum(map(len, sections[-1])) >= SECTION:
            sections.append([])
        sections[-1].append(paragraph)
    if len(sections) > 1 and sum(map(len, sections[-1])) < SECTION // 2:
        last = sections.pop()
        sections[-1] += last
    return [tuple(section) for section in sections]


def opening(documents: Sequence[Document]) -> str:
    """The first paragraph that begins with a capital letter and has eight words, or else any.

    Example:
      >>> opening([["no", "So this one has eight words or more."]])
      'So this one has eight words or more.'
    """
    texts = [text for document in documents for text in document]
    prose = (text for text in texts if text[0].isupper() and len(text.split()) >= 8)
    return next(prose, texts[0])


def sentences(document: Document) -> list[str]:
    """The sentences of a document's paragraphs; a program is one sentence.

    Example:
      >>> sentences(("It runs. It ends.", "   x = 1"))
      ['It runs.', 'It ends.', 'x = 1']
    """
    found = []
    for paragraph in document:
        if paragraph.startswith(" "):
            found.append(" ".join(paragraph.split()))
        else:
            found += _split(paragraph)
    return found


def _split(paragraph: str) -> list[str]:
    """Sentences end at marks before a number, or a letter of a script that is no small one."""
    ends = [match for match in SENTENCE_END.finditer(paragraph) if not match[1].islower()]
    starts = [0, *(match.end() for match in ends)]
    stops = [*(match.start() for match in ends), len(paragraph)]
    return [paragraph[start:stop] for start, stop in zip(starts, stops, strict=True)]
