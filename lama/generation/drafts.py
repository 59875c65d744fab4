"""Drafts of the next tokens without a model: those after an earlier occurrence of the text's end."""

from collections.abc import Sequence

import numpy as np

LONGEST, SHORTEST = 4, 2  # tokens at the end of the text that are looked for earlier in it


def draft(tokens: Sequence[int], n: int) -> list[int]:
    """Up to n tokens that followed the last earlier occurrence of the text's end; none if there is none.

    Source: Saxena 2023, prompt lookup decoding.
    """
    text = np.asarray(tokens)
    for length in range(LONGEST, SHORTEST - 1, -1):
        if len(text) <= length:
            continue
        starts = np.flatnonzero(text[:-length] == text[-length])
        for offset in range(1, length):
            starts = starts[text[starts + offset] == text[len(text) - length + offset]]
        if len(starts):
            begin = int(starts[-1]) + length
            return text[begin : begin + n].tolist()
    return []
