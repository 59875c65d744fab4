"""From a text to batches: encode it, split it, cut windows out of it; which examples a step learns from."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from lama.errors import LamaError
from lama.tokenizers import Tokenizer


def encode_corpus(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The text's token ids, one axis, in the smallest of uint8, uint16 and uint32 that holds the vocabulary."""
    return np.array(tokenizer.encode(text), dtype=np.min_scalar_type(tokenizer.vocab_size - 1))


def split(data: np.ndarray, validation: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """The first part to train on and the last `validation` of it to judge by. Views, not copies."""
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1; got validation={validation}")
    end = int(len(data) * (1 - validation))
    return data[:end], data[end:]


def batch(data: np.ndarray, step: int, seed: int, batch_size: int, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random windows and, for each of their tokens, the one that follows: two (batch_size, context_length) int32 arrays.

    The same data, seed and step give the same batch, so a run that is resumed reads what it would have read.
    Raises LamaError if the data is shorter than one window and the token after it.
    """
    _check(data, context_length)
    starts = np.random.default_rng((seed, step)).integers(len(data) - context_length, size=batch_size)
    return _inputs_targets(data, starts, context_length)


def evaluation_windows(data: np.ndarray, context_length: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All windows that lie end to end from the start, or `limit` of them spread evenly; as in `batch`, N of them.

    No token is a target twice. Raises LamaError as `batch` does.
    """
    _check(data, context_length)
    n = (len(data) - 1) // context_length
    return _inputs_targets(data, spread(n, min(n, limit or n)) * context_length, context_length)


def cut(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The windows of `length` tokens that begin at `starts`: (N, length) int32."""
    return data[starts[:, None] + np.arange(length)].astype(np.int32)


def spread(n: int, kept: int) -> np.ndarray:
    """`kept` of the numbers below n, spread evenly."""
    return np.arange(kept) * n // kept


def shuffled(n: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Which of n examples a step learns from, a function of seed and step alone: epoch by epoch, every example once in each, in an
    order of its own."""

    @lru_cache(maxsize=2)  # a batch may lie across two epochs
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(n)

    def places(step: int) -> np.ndarray:
        return np.array([order(place // n)[place % n] for place in range(step * batch_size, (step + 1) * batch_size)])

    return places


def _inputs_targets(data: np.ndarray, starts: np.ndarray, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    windows = cut(data, starts, context_length + 1)
    return windows[:, :-1], windows[:, 1:]


def _check(data: np.ndarray, context_length: int) -> None:
    if len(data) <= context_length:
        raise LamaError(
            f"a corpus must be longer than context_length; got {len(data)} tokens (after the train/validation split), "
            f"context_length={context_length}. Use a longer text or a shorter context"
        )
