"""Pairs of texts, a source and its target: their files, their split, and their arrays for training."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lama.data.windows import epoch_order
from lama.errors import LamaError, quoted
from lama.files import quoted_path, read_text
from lama.shapes import Array
from lama.tokenizers import PairTokenizer

Pair = tuple[str, str]
Arrays = tuple[Array, Array, Array, Array]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a UTF-8 file, one a line: source, tab, target. Raises LamaError."""
    pairs, shown = [], quoted_path(path)
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        source, *rest = line.removesuffix("\r").split("\t")
        if not line.strip():
            continue
        if len(rest) != 1 or not source or not rest[0]:
            found = f"{quoted(line[:60])} in line {number} of {shown}"
            raise LamaError(f"each line must be a source, one tab and a target; got {found}")
        pairs.append((source, rest[0]))
    if not pairs:
        raise LamaError(f"a file of pairs must have at least one; got none in {shown}")
    return pairs


def split_pairs(
    pairs: Sequence[Pair], held_out: float, key: Callable[[Pair], str] = lambda pair: pair[0]
) -> tuple[list[Pair], list[Pair]]:
    """The training pairs, and a held-out share of about `held_out`.

    The part of a pair depends only on its key, not on other pairs, seeds or machines.
    """
    sides: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        sides[zlib.crc32(key(pair).encode()) / 2**32 < held_out].append(pair)
    return sides


@dataclass(frozen=True)
class PairData:
    """Pairs as token ids: sources end with `end`, targets have no special tokens."""

    pairs: list[Pair]
    sources: list[list[int]]
    targets: list[list[int]]

    @property
    def lengths(self) -> tuple[int, int]:
        """The tokens of the longest source, and of the longest target with one special token."""
        return max(map(len, self.sources)), max(map(len, self.targets)) + 1


def encode_pairs(pairs: Sequence[Pair], tokenizer: PairTokenizer) -> PairData:
    """The pairs as token ids. Raises LamaError for text that the tokenizer cannot spell."""
    sources = [encode_source(source, tokenizer) for source, _ in pairs]
    return PairData(list(pairs), sources, [tokenizer.encode(target) for _, target in pairs])


def encode_source(text: str, tokenizer: PairTokenizer) -> list[int]:
    return [*tokenizer.encode(text), tokenizer.end]


def padded(rows: Sequence[Sequence[int]], length: int, pad: int = PairTokenizer.pad) -> Array:
    """The rows with padding at their ends: (rows, length) int32."""
    array = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


def pair_arrays(data: PairData, rows: Sequence[int], lengths: tuple[int, int], n_rows: int = 0) -> Arrays:
    """The arrays for the loss of these rows: sources (B, S), inputs, targets and weights (B, T).

    The mean of loss · weight over all positions is the mean loss of the tokens that are not padding. The mean
    of these means over equal parts of the rows is the same. B is at least `n_rows`: further rows are padding.
    """
    sources, targets = [data.sources[i] for i in rows], [data.targets[i] for i in rows]
    empty: list[list[int]] = [[] for _ in range(n_rows - len(rows))]
    inputs = padded([[PairTokenizer.begin, *target] for target in targets] + empty, lengths[1])
    wanted = padded([[*target, PairTokenizer.end] for target in targets] + empty, lengths[1])
    counted = wanted != PairTokenizer.pad
    weights = (counted * (counted.size / counted.sum())).astype(np.float32)
    return padded(sources + empty, lengths[0]), inputs, wanted, weights


def pair_batches(data: PairData, batch_size: int, seed: int) -> Callable[[int], Arrays]:
    """The training batches, a function of seed and step, in the order of `epoch_order`.

    Every batch is padded to the longest pair of all, so that one captured step can compute them all.
    """
    lengths, places = data.lengths, epoch_order(len(data.pairs), batch_size, seed)
    return lambda step: pair_arrays(data, places(step).tolist(), lengths)


def pair_baselines(train: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, float]:
    """The shares of `held_out` that two answers without a model get right.

    `copying` is the source itself, left out if that is the task; `commonest target` is the one of `train`.
    """
    commonest = Counter(target for _, target in train).most_common(1)[0][0]
    shares = {
        "copying": sum(source == target for source, target in held_out) / len(held_out),
        "commonest target": sum(target == commonest for _, target in held_out) / len(held_out),
    }
    return {name: share for name, share in shares.items() if name != "copying" or share < 1}


def unigram_loss(train: PairData, held_out: PairData, vocab_size: int) -> float:
    """Nats per token of `held_out`'s targets and ends, if tokens are predicted by their shares in `train`."""
    counts = np.full(vocab_size, 0.1)
    for target in train.targets:
        np.add.at(counts, [*target, PairTokenizer.end], 1)
    log_p = np.log(counts / counts.sum())
    tokens = [token for target in held_out.targets for token in (*target, PairTokenizer.end)]
    return float(-log_p[tokens].mean())
