"""A baseline for texts: naive Bayes on the counts of character n-grams in each class.

See Manning et al. 2008,
https://nlp.stanford.edu/IR-book/html/htmledition/naive-bayes-text-classification-1.html
"""

from collections.abc import Iterator, Sequence

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
