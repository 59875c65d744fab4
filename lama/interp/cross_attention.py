"""Where the decoder looks in the source: which share of cross-attention goes where it should."""

from collections.abc import Sequence

import numpy as np
from tinygrad import Tensor

from lama.data.pairs import PairData, pair_arrays
from lama.models.transformer import Transformer
from lama.taps import Recorder

Fields = Sequence[tuple[range, range]]


def cross_patterns(model: Transformer, data: PairData) -> np.ndarray:
    """The patterns of all cross-attentions on these pairs, the true targets read: (n_layers, B, H, T, S).

    Row t belongs to the prediction of the target's token t.
    """
    sources, inputs, _, _ = pair_arrays(data, range(len(data.pairs)), data.lengths)
    record = Recorder("decoder.blocks.*.cross_attn.pattern")
    model(Tensor(sources), Tensor(inputs), tap=record).realize()
    return np.stack([record[f"decoder.blocks.{i}.cross_attn.pattern"].numpy() for i in range(model.config.n_decoder_layers)])


def focus(patterns: np.ndarray, fields: Sequence[Fields]) -> np.ndarray:
    """The share of attention that goes from each field's places in the target to its places in the source, on average over
    the places: (n_layers, H). `fields[b]` are those of pair b, in tokens.

    A head that looks at all of n places alike has a share of the field's length / n.
    """
    total, rows = np.zeros((patterns.shape[0], patterns.shape[2])), 0
    for b, of_pair in enumerate(fields):
        for target, source in of_pair:
            total += patterns[:, b, :, target.start : target.stop, source.start : source.stop].sum((-1, -2))
            rows += len(target)
    return total / max(1, rows)
