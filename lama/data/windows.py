"""From a text to batches: token ids, their split, windows, and the batch of each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lama.errors import LamaError
from lama.shapes import Array
from lama.tokenizers import Tokenizer


def encode_corpus(tokenizer: Tokenizer, text: str) -> Array:
    """Token ids (n,), in the smallest of uint8, uint16 and uint32 that holds the vocabulary."""
    return np.array(tokenizer.encode(text), dtype=np.min_scalar_type(tokenizer.vocab_size - 1))


def split_tail(data: Array, validation: float = 0.1) -> tuple[Array, Array]:
    """Views of the training part and of the last `validation` of the data, which is held out."""
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1; got validation={validation}")
    end = int(len(data) * (1 - validation))
    return data[:end], data[end:]


@dataclass(frozen=True)
class Mixture:
    """Sources that are joined to one text, and their shares in the batches."""

    ends: Sequence[int]
    weights: Sequence[float]
    """A weight for each source; only their ratios matter."""

    def draw(self, rng: np.random.Generator, n: int, length: int) -> Array:
        """The starts of n random windows of `length` tokens and the next one, each within a source."""
        begins, ends = np.array([0, *self.ends[:-1]]), np.array(self.ends)
        weights = np.array(self.weights, float)
        sources = rng.choice(len(ends), size=n, p=weights / weights.sum())
        return rng.integers(begins[sources], ends[sources] - length)


def batch(
    data: Array,
    step: int,
    seed: int,
    batch_size: int,
    context_length: int,
    mixture: Mixture | None = None,
    ends: Array | None = None,
) -> tuple[Array, ...]:
    """Random windows, and the token after each of their tokens: two (batch_size, context_length) int32.

    With a `mixture`, sources have these shares of the windows. With `ends`, the ends of the documents, a
    third array has `document_starts`. The batch is a function of data, seed and step, so that a resumed run
    reads the same batches. Raises LamaError if the data is shorter than one window and the token after it.
    """
    _check(data, context_length)
    rng = np.random.default_rng((seed, step))
    if mixture is None:
        starts = rng.integers(len(data) - context_length, size=batch_size)
    else:
        starts = mixture.draw(rng, batch_size, context_length)
    return _windows(data, starts, context_length, ends)


def evaluation_windows(
    data: Array, context_length: int, limit: int | None = None, ends: Array | None = None
) -> tuple[Array, ...]:
    """All N adjacent windows, or `limit` evenly spaced ones, as arrays like those of `batch`.

    No token is a target twice. Raises LamaError as `batch` does.
    """
    _check(data, context_length)
    n = (len(data) - 1) // context_length
    starts = evenly_spaced(n, min(n, limit or n)) * context_length
    return _windows(data, starts, context_length, ends)


def take_windows(data: Array, starts: Array, length: int) -> Array:
    """The windows of `length` tokens that begin at `starts`: (N, length) int32."""
    return data[starts[:, None] + np.arange(length)].astype(np.int32)


def evenly_spaced(n: int, count: int) -> Array:
    return np.arange(count) * n // count


def epoch_order(n: int, batch_size: int, seed: int) -> Callable[[int], Array]:
    """The indices of each step's examples, out of n: a function of seed and step.

    Each epoch has every example once, in a different order.
    """

    @lru_cache(maxsize=2)  # a batch may span two epochs
    def order(epoch: int) -> Array:
        return np.random.default_rng((seed, epoch)).permutation(n)

    def indices(step: int) -> Array:
        return np.array([order(i // n)[i % n] for i in range(step * batch_size, (step + 1) * batch_size)])

    return indices


def document_starts(ends: Array, starts: Array, length: int) -> Array:
    """For each token of windows at `starts`, the place in the window where its document begins.

    (N, length) int32, 0 for documents that begin before the window; `ends` are the ends of the documents.
    """
    places = starts[:, None] + np.arange(length)
    before = np.searchsorted(ends, places, side="right")  # documents that end before the token
    begins = np.where(before > 0, ends[np.maximum(before - 1, 0)], 0)
    return np.maximum(begins - starts[:, None], 0).astype(np.int32)


def _windows(data: Array, starts: Array, length: int, ends: Array | None) -> tuple[Array, ...]:
    windows = take_windows(data, starts, length + 1)
    arrays = windows[:, :-1], windows[:, 1:]
    return arrays if ends is None else (*arrays, document_starts(ends, starts, length))


def _check(data: Array, context_length: int) -> None:
    if len(data) <= context_length:
        got = f"{len(data)} tokens (after the train/validation split), context_length={context_length}"
        advice = "Use a longer text or a shorter context"
        raise LamaError(f"a corpus must be longer than context_length; got {got}. {advice}")
