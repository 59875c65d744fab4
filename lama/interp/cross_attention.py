"""Where the decoder looks in the source: which share of cross-attention goes where it should, and a picture of one head."""

from collections.abc import Sequence

import numpy as np
from tinygrad import Tensor

from lama.data.pairs import PairData, pair_arrays
from lama.models.transformer import Transformer
from lama.taps import Recorder

Fields = Sequence[tuple[range, range]]
SHADES = " .:-=+*#%@"


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


def draw_pattern(pattern: np.ndarray, target: Sequence[str], source: Sequence[str]) -> str:
    """One pattern (T, S) in characters: a row for each token of the target, darker where more of its attention goes."""
    width = max(map(len, target), default=1)
    cells = np.minimum((pattern * len(SHADES)).astype(int), len(SHADES) - 1)
    lines = [" " * (width + 2) + " ".join(token[:1] for token in source)]
    lines += [f"{token:>{width}}  {' '.join(SHADES[i] for i in row[: len(source)])}" for token, row in zip(target, cells, strict=False)]
    return "\n".join(line.rstrip() for line in lines)
