"""Documents as rows of one length: a stream cut anywhere, one piece a row, or several with a mask.

A document of the ids a b c is read as END a b c and to be predicted as a b c END.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments import BadInput
from jattn.models.pretraining import IGNORED

END = 0  # the id between documents


class Rows(NamedTuple):
    """Rows of tokens, and what follows each; int32 `[R, T]`.

    Attributes:
      tokens: to be read.
      targets: to be predicted; `IGNORED` after the last of a row.
      segments: numbers of the pieces in a row; None: each row is one text.
      positions: of the tokens in their pieces; None: in their rows.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None = None
    positions: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Rows":
        """Some of the rows."""
        tokens, targets, *others = self
        of_pieces = [None if each is None else each[rows] for each in others]
        return Rows(tokens[rows], targets[rows], *of_pieces)


def windows(documents: Sequence[Sequence[int]], length: int, offset: int = 0) -> Rows:
    """The stream of all documents, from `offset` on, cut into rows.

    Raises:
      BadInput: the stream is too short for one row.

    Example:
      >>> rows = windows([[5, 6], [7, 8, 9]], 3)
      >>> rows.tokens.tolist(), rows.targets.tolist()
      ([[0, 5, 6], [0, 7, 8]], [[5, 6, 0], [7, 8, 9]])
    """
    stream = np.array([id for document in documents for id in (END, *document)] + [END], np.int32)
    count = (len(stream) - 1 - offset) // length
    if count < 1:
        raise BadInput(f"the text has {len(stream) - 1} tokens, too few for one of {length}")
    cut = stream[offset : offset + count * length + 1]
    return Rows(cut[:-1].reshape(count, length), cut[1:].reshape(count, length))


def alone(documents: Sequence[Sequence[int]], length: int) -> Rows:
    """Each piece of a document in a row of its own; a document longer than a row is cut.

    Example:
      >>> rows = alone([[5, 6, 7]], 3)
      >>> rows.tokens.tolist(), rows.targets.tolist()
      ([[0, 5, 6], [7, 0, 0]], [[5, 6, 7], [0, -100, -100]])
    """
    return _filled([[piece] for piece in _pieces(documents, length)], length)._replace(
        segments=None, positions=None
    )


def packed(documents: Sequence[Sequence[int]], length: int) -> Rows:
    """As many pieces in each row as fit in, the longest first.

    With `masks.segments(segments)` and `positions` each piece is read as if it were alone.

    Example:
      >>> rows = packed([[5, 6, 7, 8], [9]], 3)
      >>> rows.tokens.tolist(), rows.segments.tolist(), rows.positions.tolist()
      ([[0, 5, 6], [7, 8, 0], [0, 9, 0]], [[1, 1, 1], [1, 1, 0], [1, 1, 0]], \
[[0, 1, 2], [0, 1, 0], [0, 1, 0]])
    """
    rows: list[list[tuple[list[int], list[int]]]] = []
    room: dict[int, int] = {}  # of the rows that are not full
    for piece in sorted(_pieces(documents, length), key=lambda piece: -len(piece[0])):
        size = len(piece[0])
        row = next((i for i, free in room.items() if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        room[row] = room.get(row, length) - size
        if not room[row]:
            del room[row]
    return _filled(rows, length)


def _pieces(
    documents: Sequence[Sequence[int]], length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """What is read and what is predicted, of at most `length` tokens."""
    for document in documents:
        read, predicted = [END, *document], [*document, END]
        for start in range(0, len(read), length):
            yield read[start : start + length], predicted[start : start + length]


def _filled(rows: Sequence[Sequence[tuple[list[int], list[int]]]], length: int) -> Rows:
    shape = len(rows), length
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    targets = np.full(shape, IGNORED, np.int32)
    for i, row in enumerate(rows):
        start = 0
        for number, (read, predicted) in enumerate(row, 1):
            place = i, slice(start, start + len(read))
            tokens[place], targets[place] = read, predicted
            segments[place], positions[place] = number, np.arange(len(read))
            start += len(read)
    return Rows(tokens, targets, segments, positions)
