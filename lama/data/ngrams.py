"""What counting alone achieves: the n-gram baselines that a trained model has to beat."""

import math
from collections.abc import Sequence

import numpy as np

NAMES = ("uniform", "unigram", "bigram", "trigram", "4-gram")


def ngram_loss(train: np.ndarray, heldout: np.ndarray, n: int, vocab_size: int, k: float = 0.1) -> float:
    """Cross-entropy on `heldout`, in nats per token, of the n-gram model counted on `train`.

    p(token | n−1 before it) = (count(before, token) + k) / (count(before) + k · vocab_size): add-k smoothing.
    The first n−1 tokens of `heldout` are context only. n = 0 is the uniform distribution: ln(vocab_size).
    Raises ValueError for n-grams that do not fit 63 bits, and for texts shorter than n.
    """
    if n == 0:
        return math.log(vocab_size)
    if vocab_size**n >= 2**63:
        raise ValueError(f"vocab_size**n must fit 63 bits; got vocab_size={vocab_size}, n={n}")
    if min(len(train), len(heldout)) < n:
        raise ValueError(f"both texts must have at least n tokens; got {len(train)} and {len(heldout)}, n={n}")
    seen, asked = _codes(train, n, vocab_size), _codes(heldout, n, vocab_size)
    together = _counts(seen, asked)
    before = _counts(seen // vocab_size, asked // vocab_size)
    return float(np.mean(np.log(before + k * vocab_size) - np.log(together + k)))


def ngram_baselines(
    train: np.ndarray, heldout: np.ndarray, vocab_size: int, orders: Sequence[int] = (0, 1, 2, 3), limit: int = 20_000_000
) -> dict[str, float]:
    """Loss by name: `{"uniform": 5.545, "unigram": ..., "bigram": ..., "trigram": ...}`, nats per token.

    Of each text at most the first `limit` tokens are read, and counting takes about 50 bytes of memory for each of them.
    Orders that the texts are too short for are left out, and those whose n-grams do not fit 63 bits.
    """
    train, heldout = train[:limit], heldout[:limit]
    shortest = min(len(train), len(heldout))
    return {NAMES[n]: ngram_loss(train, heldout, n, vocab_size) for n in orders if n <= shortest and vocab_size**n < 2**63}


def _codes(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """One number for each n tokens in a row, the last of them the last digit in base vocab_size: (len − n + 1,) int64."""
    codes = np.zeros(len(tokens) - n + 1, np.int64)
    for i in range(n):
        codes = codes * vocab_size + tokens[i : i + len(codes)]
    return codes


def _counts(seen: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """How often each of `asked` is among `seen`."""
    values, counts = np.unique(seen, return_counts=True)
    places = np.minimum(np.searchsorted(values, asked), len(values) - 1)
    return np.where(values[places] == asked, counts[places], 0)
