"""Measure how much of the cross-attention is on the part of the source that has the answer."""

from collections.abc import Sequence

import numpy as np

from lama.data.pairs import PairData, pair_arrays
from lama.interp.record import run_with_cache
from lama.models.encoder_decoder import Transformer
from lama.shapes import Array

Fields = Sequence[tuple[range, range]]


def cross_patterns(model: Transformer, data: PairData) -> Array:
    """Cross-attention patterns (n_layers, B, H, T, S) on these pairs, with the true targets as input.

    Row t predicts the target's token t.
    """
    sources, inputs, _, _ = pair_arrays(data, range(len(data.pairs)), data.lengths)
    _, cache = run_with_cache(model, (sources, inputs), "decoder.blocks.*.cross_attn.pattern")
    return np.stack([*cache.values()])


def focus(patterns: Array, fields: Sequence[Fields]) -> Array:
    """Mean share of attention from each field's target tokens to its source tokens: (n_layers, H).

    `fields[b]` has the token ranges (target, source) of pair b. A head that attends to all n tokens equally
    has a share of len(source) / n.
    """
    total, rows = np.zeros((patterns.shape[0], patterns.shape[2])), 0
    for b, pair in enumerate(fields):
        for target, source in pair:
            total += patterns[:, b, :, target.start : target.stop, source.start : source.stop].sum((-1, -2))
            rows += len(target)
    return total / max(1, rows)
