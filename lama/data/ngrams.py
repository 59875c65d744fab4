"""The n-gram baselines that a trained model has to beat."""

import math

import numpy as np

from lama.shapes import Array

K = 0.1
NAMES = ("uniform", "unigram", "bigram", "trigram")


def ngram_loss(train: Array, heldout: Array, n: int, vocab_size: int) -> float:
    """Cross-entropy on `heldout`, in nats per token, of the n-gram model counted on `train`.

    p(token | n−1 before it) = (count(before, token) + K) / (count(before) + K · vocab_size): add-k smoothing.
    The first n−1 tokens of `heldout` are context only. n = 0 is the uniform distribution: ln(vocab_size).
    Raises ValueError for n-grams that do not fit 63 bits, and for texts shorter than n.
    """
    if n == 0:
        return math.log(vocab_size)
    if vocab_size**n >= 2**63:
        raise ValueError(f"vocab_size**n must fit 63 bits; got vocab_size={vocab_size}, n={n}")
    if min(len(train), len(heldout)) < n:
        sizes = f"{len(train)} and {len(heldout)}, n={n}"
        raise ValueError(f"both texts must have at least n tokens; got {sizes}")
    seen, wanted = _codes(train, n, vocab_size), _codes(heldout, n, vocab_size)
    both = _counts(seen, wanted)
    before = _counts(seen // vocab_size, wanted // vocab_size)
    return float(np.mean(np.log(before + K * vocab_size) - np.log(both + K)))


def witten_bell_loss(train: Array, heldout: Array, n: int, vocab_size: int) -> float:
    """Cross-entropy on `heldout`, in nats per token, of n-gram counts with Witten–Bell smoothing.

    p_k(token | k−1 before it) = (count(before, token) + kinds · p_{k−1}(token)) / (count(before) + kinds),
    where `kinds` is the number of distinct tokens seen after `before`. If there are none, it is p_{k−1}; p₀
    is uniform. The first tokens have shorter contexts. Raises ValueError for n-grams that do not fit 63 bits.
    Source: Witten & Bell 1991, interpolated as in Chen & Goodman 1999, section 2.5.
    """
    if vocab_size**n >= 2**63:
        raise ValueError(f"vocab_size**n must fit 63 bits; got vocab_size={vocab_size}, n={n}")
    p = np.full(len(heldout), 1 / vocab_size)
    for k in range(1, n + 1):
        seen, wanted = _codes(train, k, vocab_size), _codes(heldout, k, vocab_size)
        kinds = _counts(np.unique(seen) // vocab_size, wanted // vocab_size)
        total = _counts(seen // vocab_size, wanted // vocab_size) + kinds
        shorter = p[k - 1 :]
        longer = (_counts(seen, wanted) + kinds * shorter) / np.maximum(total, 1)
        p[k - 1 :] = np.where(total > 0, longer, shorter)
    return float(-np.log(p).mean())


def ngram_baselines(
    train: Array, heldout: Array, vocab_size: int, limit: int = 20_000_000
) -> dict[str, float]:
    """Loss by name: `{"uniform": 5.545, "unigram": ..., "bigram": ..., "trigram": ...}`, nats per token.

    Each text is cut to `limit` tokens; counting takes about 50 bytes of memory a token. Orders n that do not
    fit the texts or 63 bits are left out.
    """
    train, heldout = train[:limit], heldout[:limit]
    shortest = min(len(train), len(heldout))
    fitting = [(n, name) for n, name in enumerate(NAMES) if n <= shortest and vocab_size**n < 2**63]
    return {name: ngram_loss(train, heldout, n, vocab_size) for n, name in fitting}


def _codes(tokens: Array, n: int, vocab_size: int) -> Array:
    """The n-grams as numbers in base vocab_size, the last token last: (len − n + 1,) int64."""
    codes = np.zeros(len(tokens) - n + 1, np.int64)
    for i in range(n):
        codes = codes * vocab_size + tokens[i : i + len(codes)]
    return codes


def _counts(seen: Array, wanted: Array) -> Array:
    values, counts = np.unique(seen, return_counts=True)
    places = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[places] == wanted, counts[places], 0)
