"""From one row of logits to the next token, in numpy: a seed gives the same text on every device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lama.errors import UsageError
from lama.shapes import Array

BLOCK = 256  # probabilities that are summed first
COLUMNS = 1024  # their largest numbers bound the k largest of all


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. Filters apply in the order of the fields, as in transformers.

    Raises UsageError for a value out of its range.
    """

    repetition_penalty: float = 1.0
    """Divide positive logits of tokens already seen by this, multiply negative ones. Source: Keskar 2019."""
    temperature: float = 1.0
    """Divide the logits by this; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach this sum. Source: Holtzman et al. 2020."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the most likely one. Source: Nguyen et al. 2024."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that were already generated. Source: OpenAI's API."""
    frequency_penalty: float = 0.0
    """Subtract this for each time that a token was generated. Neither penalty counts the prompt's tokens."""

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        rules = (
            ("repetition_penalty", 0.01 <= penalty <= 100, "between 0.01 and 100; 1 changes nothing"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (keep all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise UsageError(f"{name} must be {rule}; got {getattr(self, name)}")


GREEDY = Sampling(temperature=0.0)


def next_token(
    logits: Array, seen: Sequence[int], sampling: Sampling, rng: np.random.Generator, prompt: int = 0
) -> int:
    """Sample one token from `logits` (vocab_size,); penalties apply to the tokens `seen`.

    The first `prompt` of these are the prompt's, not generated. A logit of -inf is never sampled.
    """
    logits = penalised(logits, seen, sampling, prompt)
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens, p = _distribution(logits, sampling)
    drawn = _drawn(p, rng.random())
    return drawn if tokens is None else int(tokens[drawn])


def _drawn(p: Array, share: float) -> int:
    """The first index whose sum of p up to it exceeds `share` of the whole; 0 <= share < 1.

    Only one block of p is summed number by number, which takes a fifth of the time for 50,000.
    """
    sums = np.add.reduceat(p, np.arange(0, len(p), BLOCK)).cumsum()
    wanted = share * sums[-1]
    block = int(sums.searchsorted(wanted, side="right"))
    before = sums[block - 1] if block else 0.0
    some = p[block * BLOCK : (block + 1) * BLOCK]
    within = int((before + some.cumsum()).searchsorted(wanted, side="right"))
    # The two sums of a block may differ in the last bit: then it is the last token with a probability.
    return block * BLOCK + min(within, int(np.flatnonzero(some)[-1]))


def penalised(logits: Array, seen: Sequence[int], sampling: Sampling, prompt: int = 0) -> Array:
    """The logits, with tokens already seen made less likely. Source: Keskar et al. 2019, section 4.1."""
    penalty = sampling.repetition_penalty
    if penalty != 1 and len(seen):
        logits, repeated = logits.astype(np.float64), np.unique(np.asarray(seen))
        scores = logits[repeated]
        logits[repeated] = np.where(scores > 0, scores / penalty, scores * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and len(seen) > prompt:
        tokens, counts = np.unique(np.asarray(seen[prompt:]), return_counts=True)
        logits = logits.astype(np.float64)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The distribution to sample from: (vocab_size,) float64, with zeros for the tokens filtered out."""
    tokens, p = _distribution(logits, sampling)
    if tokens is None:
        return p / p.sum()
    all_tokens = np.zeros(len(logits))
    all_tokens[tokens] = p / p.sum()
    return all_tokens


def _distribution(logits: Array, sampling: Sampling) -> tuple[Array | None, Array]:
    """The remaining tokens in order (None: all), and their unnormalised probabilities."""
    tokens, best = None, float(logits.max())
    if 0 < sampling.top_k < len(logits):
        tokens = _largest(logits, sampling.top_k)
        logits = logits[tokens]
    with np.errstate(over="ignore"):  # far below the best at a tiny temperature: probability 0
        p = np.exp((logits.astype(np.float64) - best) / sampling.temperature)
    if sampling.top_p < 1:
        p /= p.sum()
        kept = _nucleus(p, sampling.top_p)
        tokens, p = kept if tokens is None else tokens[kept], p[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(p >= sampling.min_p * p.max())
        tokens, p = kept if tokens is None else tokens[kept], p[kept]
    return tokens, p


def _nucleus(p: Array, share: float) -> Array:
    """Indices of the fewest most likely entries that sum to `share`, sorted; of equals, the first."""
    count = 64
    while True:
        count = min(8 * count, len(p))
        some = np.flatnonzero(p >= p[_largest(p, count)].min())
        order = some[np.argsort(-p[some], kind="stable")]
        sums = np.cumsum(p[order])
        if sums[-1] >= share or count == len(p):
            return np.sort(order[sums - p[order] < share])  # entries whose predecessors do not reach it


def _largest(x: Array, k: int) -> Array:
    """Indices of the k largest numbers, sorted; 1 <= k <= len(x)."""
    height = len(x) // COLUMNS
    some = np.arange(len(x))
    if height > 1 and k <= COLUMNS // 2:  # k columns have a largest number that is as large as `least`
        most = x[: height * COLUMNS].reshape(height, COLUMNS).max(0)
        least = np.partition(most, -k)[-k]
        some = np.flatnonzero(x >= least)
    return some[np.sort(np.argpartition(x[some], -k)[-k:])]
