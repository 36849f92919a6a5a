"""Baselines that count: naive Bayes on character n-grams, and a guess of a word by its neighbours.

Of naive Bayes see Manning et al. 2008,
https://nlp.stanford.edu/IR-book/html/htmledition/naive-bayes-text-classification-1.html
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from experiments.data.labelled import Text


class NaiveBayes:
    """Multinomial naive Bayes on character n-grams, the ends of a text included.

        label(text) = argmax_c log p(c) + Σ_g log p(g | c),   p(g | c) = (n_cg + α) / Σ_h (n_ch + α)

    It ignores n-grams that the training texts do not contain.

    Args:
      texts: the training texts.
      longest: the largest n; all smaller ones count too.
      smoothing: α.

    Example:
      >>> texts = [Text("Rom", "de", "rome"), Text("Roma", "it", "rome")]
      >>> NaiveBayes(texts)(["dom", "doma"])
      ['de', 'it']
    """

    def __init__(self, texts: Sequence[Text], *, longest: int = 4, smoothing: float = 0.1):
        self.longest = longest
        self.labels = sorted({text.label for text in texts})
        number = {label: i for i, label in enumerate(self.labels)}
        self.columns: dict[str, int] = {}
        cells = [
            (number[text.label], self.columns.setdefault(gram, len(self.columns)))
            for text in texts
            for gram in self._grams(text.text)
        ]
        counts = np.full((len(self.labels), len(self.columns)), smoothing)
        np.add.at(counts, tuple(np.array(cells).T), 1)
        self.log_likelihood = np.log(counts / counts.sum(axis=1, keepdims=True))
        self.log_prior = np.log(np.bincount([number[text.label] for text in texts]) / len(texts))

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The label of each text."""
        return [self.labels[np.argmax(self._scores(text))] for text in texts]

    def _scores(self, text: str) -> np.ndarray:
        known = [self.columns[gram] for gram in self._grams(text) if gram in self.columns]
        return self.log_prior + self.log_likelihood[:, known].sum(axis=1)

    def _grams(self, text: str) -> Iterator[str]:
        ended = f"\n{text}\n"  # no text holds a line break
        return (
            ended[i : i + length]
            for length in range(1, self.longest + 1)
            for i in range(len(ended) - length + 1)
        )


class Neighbours:
    """Guess a word by counts of the words that stood between the same two, or after the first.

        word = argmax_w n(before, w, after), else argmax_w n(before, w), else argmax_w n(w)

    The longest n-gram that the training texts contain decides; of equal counts the smallest id.

    Args:
      texts: token ids of the training texts.
      ends: ids that are no words, such as those of the ends of a text; never guessed alone.

    Example:
      >>> guess = Neighbours([[1, 5, 2, 9, 1, 5, 2, 8], [1, 6, 3]])
      >>> guess(1, 2), guess(1, 3), guess(1, 7), guess(7, 7)  # 5 thrice, and 6 once, follow 1
      (5, 6, 5, 1)
    """

    def __init__(self, texts: Iterable[Sequence[int]], ends: Sequence[int] = ()):
        words: Counter[int] = Counter()
        after: dict[int, Counter[int]] = defaultdict(Counter)
        between: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        for text in texts:
            words.update(text)
            for before, word in pairwise(text):
                after[before][word] += 1
            for before, word, next_word in zip(text, text[1:], text[2:], strict=False):
                between[before, next_word][word] += 1
        for end in ends:
            del words[end]
        self.most_frequent = _most_frequent(words)
        self.after = {before: _most_frequent(counts) for before, counts in after.items()}
        self.between = {both: _most_frequent(counts) for both, counts in between.items()}

    def __call__(self, before: int, after: int) -> int:
        """The likeliest word between two."""
        found = self.between.get((before, after), self.after.get(before))
        return self.most_frequent if found is None else found


def _most_frequent(counts: Counter[int]) -> int:
    return min(counts, key=lambda word: (-counts[word], word))
