"""From one row of logits to the next token. On the host, in numpy: the same seed gives the same text on every device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lama.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the fields, as in transformers. Raises UsageError."""

    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens already seen by this, multiply the negative ones. Source: Keskar et al. 2019."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach this sum. Source: Holtzman et al. 2020."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the most likely one. Source: Nguyen et al. 2024."""

    def __post_init__(self) -> None:
        rules = (
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100; 1 changes nothing"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (keep all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise UsageError(f"{name} must be {rule}; got {getattr(self, name)}")


GREEDY = Sampling(temperature=0.0)


def next_token(logits: np.ndarray, seen: Sequence[int], sampling: Sampling, rng: np.random.Generator) -> int:
    """Draw one token. `logits` is (vocab_size,); `seen` holds the tokens that the repetition penalty counts."""
    logits = logits.astype(np.float64)
    if sampling.repetition_penalty != 1 and len(seen):
        repeated = np.unique(np.asarray(seen))
        scores = logits[repeated]
        logits[repeated] = np.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(rng.choice(len(logits), p=probabilities(logits, sampling)))


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that is drawn from: (vocab_size,) float64, sums to 1, zero for the tokens filtered out."""
    with np.errstate(over="ignore"):  # far below the best at a tiny temperature: probability 0
        logits = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        kept = np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]
        filtered = np.full_like(logits, -np.inf)
        filtered[kept] = logits[kept]
        logits = filtered
    p = np.exp(logits - logits.max())
    p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]  # the sum of all that are likelier
        p[order[before >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()
