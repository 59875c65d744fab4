"""Naive Bayes: the baseline that a trained classifier has to beat."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from lama.data.labelled import LabelledText, split_labelled
from lama.shapes import Array

ALPHAS = (1.0, 0.3, 0.1, 0.03)


def words(text: str) -> list[str]:
    """Words in lower case, and pairs of adjacent words: `"To be."` gives `["to", "be", "to be"]`."""
    found = re.findall(r"[\w']+", text.lower())
    return [*found, *(f"{a} {b}" for a, b in pairwise(found))]


def characters(text: str) -> list[str]:
    """Sequences of one to four characters, with marked ends: for names and other single words."""
    marked = f"^{text.lower()}$"
    return [marked[i : i + n] for n in range(1, 5) for i in range(len(marked) - n + 1)]


FEATURES: dict[str, Callable[[str], list[str]]] = {"words": words, "characters": characters}


class NaiveBayes:
    """p(label | text) ∝ p(label) ∏ p(feature | label), add-α smoothed: (count + α) / (n + α · features).

    Unknown features are ignored. Source: Manning, Raghavan & Schütze 2008, section 13.2.
    """

    def __init__(self, examples: Sequence[LabelledText], features: str, alpha: float):
        self.features, self.alpha = features, alpha
        self.labels = sorted({example.label for example in examples})
        self.index: dict[str, int] = {}
        label_of = {label: i for i, label in enumerate(self.labels)}
        rows = np.array([label_of[example.label] for example in examples])
        row, feature = self._numbered([example.text for example in examples], learn=True)
        n, most = len(self.index), len(self.labels) * len(self.index)
        counts = np.bincount(rows[row] * n + feature, minlength=most)
        smooth = counts.reshape(-1, n) + alpha  # (labels, features)
        self.log_likelihood = np.log(smooth / smooth.sum(1, keepdims=True)).T  # (features, labels)
        self.log_prior = np.log(np.bincount(rows, minlength=len(self.labels)) / len(rows))

    def _numbered(self, texts: Sequence[str], learn: bool = False) -> tuple[Array, Array]:
        """The row of each feature's text, and the feature's number."""
        extract, index = FEATURES[self.features], self.index
        pairs = [
            (row, index.setdefault(feature, len(index)) if learn else index.get(feature, -1))
            for row, text in enumerate(texts)
            for feature in extract(text)
        ]
        found = np.array(pairs, np.int64).reshape(-1, 2)
        found = found[found[:, 1] >= 0]
        return found[:, 0], found[:, 1]

    def __call__(self, texts: Sequence[str]) -> list[str]:
        scores = np.tile(self.log_prior, (len(texts), 1))
        row, feature = self._numbered(texts)
        np.add.at(scores, row, self.log_likelihood[feature])
        return [self.labels[i] for i in scores.argmax(1)]

    def accuracy(self, examples: Sequence[LabelledText]) -> float:
        found = np.array(self([example.text for example in examples]))
        return float(np.mean(found == np.array([example.label for example in examples])))


def best_naive_bayes(examples: Sequence[LabelledText]) -> NaiveBayes:
    """A model with the α that is best on a held-out tenth; of characters if most texts are single words."""
    features = "characters" if np.median([len(example.text.split()) for example in examples]) < 2 else "words"
    learned, held_out = split_labelled(examples, 0.1, seed=1)
    best = max(ALPHAS, key=lambda alpha: NaiveBayes(learned, features, alpha).accuracy(held_out))
    return NaiveBayes(examples, features, best)
