"""Masked language modelling: the tokens to be predicted, and the tokens that the model sees instead."""

import numpy as np

from lama.errors import LamaError
from lama.shapes import Array
from lama.tokenizers import BytePairTokenizer, WordPieceTokenizer

PAD, MASK = "[PAD]", "[MASK]"
CHOSEN = 0.15  # share of all tokens
MASKED, REPLACED = 0.8, 0.1  # shares of the chosen tokens

MaskTokenizer = BytePairTokenizer | WordPieceTokenizer


def special_ids(tokenizer: MaskTokenizer) -> tuple[int, int]:
    """The ids of [PAD] and [MASK]. Raises LamaError for a tokenizer without them."""
    pad, mask = tokenizer.encode(PAD), tokenizer.encode(MASK)
    if len(pad) != 1 or len(mask) != 1:
        raise LamaError(f"a tokenizer for BERT must have the tokens {PAD} and {MASK}; got one without")
    return pad[0], mask[0]


def mask_tokens(
    rows: Array,
    rng: np.random.Generator,
    mask: int,
    vocab_size: int,
    special: tuple[int, ...] = (),
) -> tuple[Array, Array, Array]:
    """Inputs (B, T), positions and targets (B, n) for masked token ids (B, T); int32.

    15 % of the ordinary tokens of each row are chosen, at least one. n is 15 % of T; a row with fewer chosen
    tokens is filled with position 0 and target -1. In the inputs, 80 % of the chosen tokens become `mask`,
    10 % a random token other than the `special` ones, and 10 % stay. So the model cannot tell which inputs to
    trust. Source: Devlin et al. 2018, section 3.1 and appendix A.1.
    """
    B, T = rows.shape
    n = max(1, round(CHOSEN * T))
    free = ~np.isin(rows, [mask, *special])
    # Free positions first, in random order.
    order = np.argsort(np.where(free, rng.random((B, T)), 2.0), axis=1)[:, :n]
    wanted = np.clip(np.round(CHOSEN * free.sum(1)), 1, free.sum(1))
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
