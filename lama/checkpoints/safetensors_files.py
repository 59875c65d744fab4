"""safetensors: an 8-byte length, a JSON header with each tensor's dtype, shape and place, then the bytes.

Source: https://huggingface.co/docs/safetensors (format).
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lama.checkpoints.atomic import atomic_write
from lama.checkpoints.stored import NUMPY, StoredTensor, fill_from, itemsize, read_bytes
from lama.errors import LamaError, first_line, quoted
from lama.files import AGAIN, quoted_path

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name. The whole header is checked here; numbers are read later, one tensor at a time.

    Raises LamaError if the file is truncated, or its header is damaged, has tensors that overlap, or names one twice.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # the format's own validation, in Rust; reads the header only
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (SafetensorError, ValueError) as error:
        raise LamaError(f"{quoted_path(path)} must be a complete safetensors file; got: {first_line(error)}. {AGAIN}") from error
    except OSError as error:
        raise LamaError(f"{quoted_path(path)} must be a readable file; got {error.strerror or first_line(error)}") from error
    header.pop("__metadata__", None)
    return {name: _stored(path, 8 + length, name, entry) for name, entry in header.items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := dict(pairs)) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice} twice in the header")
    return names


def _stored(path: Path, data_start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape, start = DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), data_start + entry["data_offsets"][0]
    read_into = partial(_read_into, path, start) if dtype in NUMPY else None
    return StoredTensor(name, dtype, shape, partial(_read, path, start, name, dtype, shape), read_into=read_into)


def _read(path: Path, start: int, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype not in NUMPY:
        got = f"{quoted(dtype, plain=True)} for {quoted(name, plain=True)} in {quoted_path(path)}"
        raise LamaError(f"tensors must have one of the dtypes {', '.join(NUMPY)}; got {got}")
    return read_bytes(path, start, math.prod(shape) * itemsize(dtype)).view(NUMPY[dtype]).reshape(shape)


def _read_into(path: Path, start: int, first: int, out: np.ndarray) -> None:
    fill_from(path, start + first * out.itemsize, out)


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write tensors in the order given, one in memory at a time; the name `path` appears when all of it is on the disk.

    Raises LamaError if it cannot be written; a file that was there before is then untouched.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * itemsize(tensor.dtype)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
