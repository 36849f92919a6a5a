"""Turn characters into numbers, and pairs of texts into padded batches of few shapes.

The step number alone decides the order of the batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from experiments.data.pairs import Pair

PAD, START, END, UNKNOWN = range(4)
SPECIAL = 4


@dataclass(frozen=True)
class Vocabulary:
    """Characters, numbered from 4; 0 is padding, 1 the start, 2 the end, 3 an unknown character.

    A character is unknown if the training texts do not contain it.

    Example:
      >>> vocabulary = Vocabulary.of(["abba", "cab"])
      >>> vocabulary.encode("cad")
      [6, 4, 3]
      >>> vocabulary.decode([6, 4, 5, 2, 0])
      'cab'
    """

    characters: str

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Vocabulary":
        """The sorted characters of `texts`."""
        return cls("".join(sorted({character for text in texts for character in text})))

    def __len__(self) -> int:
        return SPECIAL + len(self.characters)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each character."""
        return {character: i for i, character in enumerate(self.characters, SPECIAL)}

    def encode(self, text: str) -> list[int]:
        """One number for each character."""
        return [self.numbers.get(character, UNKNOWN) for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text up to the first end, without padding and start.

        An unknown character becomes U+FFFD.
        """
        text = []
        for token in tokens:
            if token == END:
                break
            if token >= UNKNOWN:
                text.append("\ufffd" if token == UNKNOWN else self.characters[token - SPECIAL])
        return "".join(text)


class Encoder(Protocol):
    """Turns a text into tokens: a `Vocabulary`, or `Labels`, where each label is one token."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...


class Batch(NamedTuple):
    """Padded token numbers (int32): sources, targets after a start, and targets before an end.

    Shapes: source [B, S], source_lengths [B], target_in and target_out [B, T], target_lengths [B].
    """

    source: np.ndarray
    source_lengths: np.ndarray
    target_in: np.ndarray
    target_out: np.ndarray
    target_lengths: np.ndarray


def pad(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens, padded with 0 to one width and stacked, and their lengths.

    Example:
      >>> pad([[5, 7], [4]])
      (array([[5, 7],
             [4, 0]], dtype=int32), array([2, 1], dtype=int32))
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), width or lengths.max()), PAD, np.int32)
    for row, padded in zip(rows, tokens, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


class Batches:
    """Training batches: `batches(step)` yields those of `step`, `step + 1`, …

    A resumed run therefore sees the same batches as one that never stopped. Sources of similar
    length share a bucket, and all batches of a bucket have one shape: at most `num_buckets` shapes
    are compiled. An epoch visits every pair in an order that `(seed, epoch)` decides. Pairs of the
    same bucket fill up its last batch.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        source: Vocabulary,
        target: Encoder,
        *,
        batch_size: int,
        seed: int,
        num_buckets: int = 3,
    ):
        self.batch_size, self.seed = batch_size, seed
        self.sources = [source.encode(pair.source) for pair in pairs]
        self.targets = [target.encode(pair.target) for pair in pairs]
        self.buckets = _buckets([len(row) for row in self.sources], num_buckets)
        self.widths = [
            (
                max(len(self.sources[i]) for i in members),
                max(len(self.targets[i]) for i in members) + 1,
            )
            for members in self.buckets
        ]
        self.per_epoch = sum(-(-len(members) // batch_size) for members in self.buckets)

    def __call__(self, step: int) -> Iterator[Batch]:
        """Endless batches, starting with the one of `step`, which counts from 0."""
        epoch, position = divmod(step, self.per_epoch)
        while True:
            for bucket, members in self._order(epoch)[position:]:
                yield self._collate(members, *self.widths[bucket])
            epoch, position = epoch + 1, 0

    def _order(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        random = np.random.default_rng((self.seed, epoch))
        order = []
        for bucket, members in enumerate(self.buckets):
            count = -(-len(members) // self.batch_size)
            filled = np.resize(random.permutation(members), (count, self.batch_size))
            order += [(bucket, batch) for batch in filled]
        return [order[i] for i in random.permutation(len(order))]

    def _collate(self, members: np.ndarray, source_width: int, target_width: int) -> Batch:
        source, source_lengths = pad([self.sources[i] for i in members], source_width)
        target_in, target_lengths = pad([[START, *self.targets[i]] for i in members], target_width)
        target_out, _ = pad([[*self.targets[i], END] for i in members], target_width)
        return Batch(source, source_lengths, target_in, target_out, target_lengths)


def _buckets(lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """The members of each bucket; quantiles of the lengths divide the buckets."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, count + 1)[1:], method="higher"))
    bucket = np.searchsorted(edges, lengths)
    return [np.flatnonzero(bucket == i) for i in range(len(edges))]


def fixed_batches(
    rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Padded batches of one shape, in order, with lengths and the number of real rows.

    The last batch repeats its last row to reach the shape.
    """
    width = max(len(row) for row in rows)
    for start in range(0, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        tokens, lengths = pad(part + part[-1:] * (batch_size - len(part)), width)
        yield tokens, lengths, len(part)
