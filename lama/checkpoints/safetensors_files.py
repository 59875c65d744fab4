"""safetensors files: an 8-byte length, a JSON header with dtypes, shapes and places, then the bytes.

Source: https://huggingface.co/docs/safetensors (format).
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np

from lama.atomic import atomic_write
from lama.checkpoints.tensor import (
    FLOATS,
    INTEGERS,
    NUMPY,
    FileTensor,
    explained,
    fill_from,
    itemsize,
    read_bytes,
)
from lama.errors import LamaError, quoted
from lama.files import quoted_path
from lama.shapes import Array

NAMES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"]
DTYPES = dict(zip(NAMES, (*FLOATS, *INTEGERS, "bool"), strict=True))
T = TypeVar("T")


class Entry(TypedDict):
    """A tensor in the header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def open_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file by name. The header is read and checked; the tensors are read later.

    Raises LamaError for a truncated file and a damaged header, such as one with overlapping tensors.
    """
    from safetensors import safe_open

    with explained(path, "safetensors file"):
        # The format's own validation, in Rust; reads the header only.
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    header.pop("__metadata__", None)
    return {name: _tensor(path, 8 + length, name, entry) for name, entry in header.items()}


def _no_duplicates(pairs: list[tuple[str, T]]) -> dict[str, T]:
    names: dict[str, T] = {}
    for name, entry in pairs:
        if name in names:
            raise ValueError(f"{name} twice in the header")
        names[name] = entry
    return names


def _tensor(path: Path, data_start: int, name: str, entry: Entry) -> FileTensor:
    dtype = DTYPES.get(entry["dtype"], entry["dtype"])
    shape = tuple(entry["shape"])
    start = data_start + entry["data_offsets"][0]
    read = partial(_read, path, start, name, dtype, shape)
    if dtype not in NUMPY:
        return FileTensor(name, dtype, shape, read)

    def read_into(first: int, out: Array) -> None:
        fill_from(path, start + first * out.itemsize, out)

    return FileTensor(name, dtype, shape, read, read_into=read_into)


def _read(path: Path, start: int, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype not in NUMPY:
        got = f"{quoted(dtype, plain=True)} for {quoted(name, plain=True)} in {quoted_path(path)}"
        raise LamaError(f"tensors must have one of the dtypes {', '.join(NUMPY)}; got {got}")
    return read_bytes(path, start, math.prod(shape) * itemsize(dtype)).view(NUMPY[dtype]).reshape(shape)


def write_safetensors(path: Path, tensors: Mapping[str, FileTensor]) -> None:
    """Write tensors in the given order, one at a time; the file gets its name when it is complete.

    Raises LamaError if it cannot be written; an earlier file of that name is then unchanged.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * itemsize(tensor.dtype)
        header[name] = Entry(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
