"""Tensors made from rows of a file's tensors, which are selected, joined or converted when they are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from lama.checkpoints.tensor import CHUNK, FileTensor, read_weights
from lama.shapes import Array

Pair: TypeAlias = tuple[FileTensor, FileTensor]


def joined(parts: Sequence[FileTensor]) -> FileTensor:
    """Concatenate tensors along their first axis; they have one type, and equal sizes of the other axes."""
    first = parts[0]
    return replace(
        first,
        shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
        read=lambda: np.concatenate([part.read() for part in parts]),
        read_into=None,
        quantized=_joined_pairs([part.quantized for part in parts]),
        exact=_joined_pairs([part.exact for part in parts]),
        stored=", ".join(sorted({part.stored for part in parts} - {""})),
    )


def _joined_pairs(pairs: Sequence[Pair | None]) -> Pair | None:
    found = [pair for pair in pairs if pair is not None]
    forms = {(values.dtype, scales.dtype, values.shape[1], scales.shape[1]) for values, scales in found}
    if len(found) < len(pairs) or len(forms) > 1:
        return None
    return joined([values for values, _ in found]), joined([scales for _, scales in found])


def selected(tensor: FileTensor, rows: Array) -> FileTensor:
    """The rows with these indices, in this order."""
    return replace(
        tensor,
        shape=(len(rows), *tensor.shape[1:]),
        read=lambda: tensor.read()[rows],
        read_into=None,
        quantized=_selected_pair(tensor.quantized, rows),
        exact=_selected_pair(tensor.exact, rows),
    )


def _selected_pair(pair: Pair | None, rows: Array) -> Pair | None:
    return None if pair is None else (selected(pair[0], rows), selected(pair[1], rows))


def spans(tensor: FileTensor, unit: int) -> Iterator[tuple[int, FileTensor]]:
    """The matrix in parts of about CHUNK numbers, a multiple of `unit` rows each, with their first rows.

    It is a single part if a part cannot be read by itself.
    """
    into, (height, width) = tensor.read_into, tensor.shape
    if into is None or tensor.transposed:
        yield 0, tensor
        return
    rows = max(1, CHUNK // max(1, width) // unit) * unit
    for first in range(0, height, rows):

        def read_into(start: int, out: Array, at: int = first * width) -> None:
            into(at + start, out)

        yield first, replace(tensor, shape=(min(rows, height - first), width), read_into=read_into)


def mapped(tensor: FileTensor, function: Callable[[Array], Array], width: int | None = None) -> FileTensor:
    """A tensor of `function` of the numbers, in float32; its rows have `width` numbers if given."""
    shape = tensor.shape if width is None else (*tensor.shape[:-1], width)

    def read() -> Array:
        return function(read_weights(tensor, "float32")).astype(np.float32)

    return FileTensor(tensor.name, "float32", shape, read)
