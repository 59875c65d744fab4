"""Tensors made of rows of a file's: selected, joined or computed when they are read."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lama.checkpoints.tensor import FileTensor, read_weights
from lama.shapes import Array


def joined(parts: Sequence[FileTensor]) -> FileTensor:
    """Concatenate tensors of one type, equal but in their first axis, along this axis."""
    first = parts[0]
    pairs = [part.quantized for part in parts if part.quantized is not None]
    return replace(
        first,
        shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
        read=lambda: np.concatenate([part.read() for part in parts]),
        read_into=None,
        quantized=(joined([v for v, _ in pairs]), joined([s for _, s in pairs])) if pairs else None,
    )


def selected(tensor: FileTensor, rows: Array) -> FileTensor:
    """The rows of these numbers, in their order."""
    return replace(
        tensor,
        shape=(len(rows), *tensor.shape[1:]),
        read=lambda: tensor.read()[rows],
        read_into=None,
        quantized=None
        if tensor.quantized is None
        else (selected(tensor.quantized[0], rows), selected(tensor.quantized[1], rows)),
    )


def mapped(tensor: FileTensor, function: Callable[[Array], Array], width: int | None = None) -> FileTensor:
    """`function` of the tensor's numbers, as float32; rows then have `width` numbers."""
    shape = tensor.shape if width is None else (*tensor.shape[:-1], width)

    def read() -> Array:
        return function(read_weights(tensor, "float32")).astype(np.float32)

    return FileTensor(tensor.name, "float32", shape, read)
