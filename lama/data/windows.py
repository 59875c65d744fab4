"""From a text to batches: token ids, their split, windows, and the examples of each step."""

from collections.abc import Callable
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


def batch(data: Array, step: int, seed: int, batch_size: int, context_length: int) -> tuple[Array, Array]:
    """Random windows, and the token after each of their tokens: two (batch_size, context_length) int32.

    A function of data, seed and step, so that a resumed run reads the same batches. Raises LamaError if the
    data is shorter than one window and the token after it.
    """
    _check(data, context_length)
    starts = np.random.default_rng((seed, step)).integers(len(data) - context_length, size=batch_size)
    return _inputs_targets(data, starts, context_length)


def evaluation_windows(data: Array, context_length: int, limit: int | None = None) -> tuple[Array, Array]:
    """All adjacent windows, or `limit` evenly spaced ones; as in `batch`, N of them.

    No token is a target twice. Raises LamaError as `batch` does.
    """
    _check(data, context_length)
    n = (len(data) - 1) // context_length
    starts = evenly_spaced(n, min(n, limit or n)) * context_length
    return _inputs_targets(data, starts, context_length)


def take_windows(data: Array, starts: Array, length: int) -> Array:
    """The windows of `length` tokens that begin at `starts`: (N, length) int32."""
    return data[starts[:, None] + np.arange(length)].astype(np.int32)


def evenly_spaced(n: int, count: int) -> Array:
    return np.arange(count) * n // count


def epoch_order(n: int, batch_size: int, seed: int) -> Callable[[int], Array]:
    """The indices of each step's examples, of n: a function of seed and step.

    Each epoch has every example once, in an order of its own.
    """

    @lru_cache(maxsize=2)  # a batch may lie across two epochs
    def order(epoch: int) -> Array:
        return np.random.default_rng((seed, epoch)).permutation(n)

    def indices(step: int) -> Array:
        return np.array([order(i // n)[i % n] for i in range(step * batch_size, (step + 1) * batch_size)])

    return indices


def _inputs_targets(data: Array, starts: Array, length: int) -> tuple[Array, Array]:
    windows = take_windows(data, starts, length + 1)
    return windows[:, :-1], windows[:, 1:]


def _check(data: Array, context_length: int) -> None:
    if len(data) <= context_length:
        got = f"{len(data)} tokens (after the train/validation split), context_length={context_length}"
        advice = "Use a longer text or a shorter context"
        raise LamaError(f"a corpus must be longer than context_length; got {got}. {advice}")
