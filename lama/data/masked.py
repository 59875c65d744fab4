"""Masked language modelling: which tokens are to be guessed, and what the model sees in their place."""

import numpy as np

PAD, MASK = "[PAD]", "[MASK]"
CHOSEN, MASKED, REPLACED = 0.15, 0.8, 0.1  # of all tokens; of those chosen


def mask_tokens(
    rows: np.ndarray, rng: np.random.Generator, mask: int, vocab_size: int, special: tuple[int, ...] = (), share: float = CHOSEN
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, T) token ids -> what the model sees (B, T), the positions it is asked for (B, n), and what belongs there (B, n); int32.

    Of each row, `share` of the tokens that are not special are chosen, at least one; n is `share` of T, and where a row has fewer,
    the rest are position 0 with the target -1. Of the chosen 80 % become `mask`, 10 % any token but the `special` ones, 10 % stay,
    so that the model cannot tell which of the tokens it sees to trust. Source: Devlin et al. 2018, section 3.1 and appendix A.1.
    """
    B, T = rows.shape
    n = max(1, round(share * T))
    free = ~np.isin(rows, [mask, *special])
    order = np.argsort(np.where(free, rng.random((B, T)), 2.0), axis=1)[:, :n]  # a random n of those that are free, then others
    wanted = np.clip(np.round(share * free.sum(1)), 1, free.sum(1))
    real = np.arange(n) < wanted[:, None]
    positions = np.where(real, order, 0)
    targets = np.where(real, np.take_along_axis(rows, positions, 1), -1)
    ordinary = np.setdiff1d(np.arange(vocab_size), [mask, *special])
    fate, others = rng.random((B, n)), rng.choice(ordinary, (B, n))
    shown = np.where(fate < MASKED, mask, np.where(fate < MASKED + REPLACED, others, targets))
    seen = rows.copy()
    row, column = np.nonzero(real)
    seen[row, positions[row, column]] = shown[row, column]
    return seen.astype(np.int32), positions.astype(np.int32), targets.astype(np.int32)
