"""A tensor that lies in a file: what it is, and how to read it when its turn comes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lama.errors import LamaError

# How each dtype is held in numpy, which has no bfloat16: its 16 bits travel as an unsigned integer.
NUMPY: dict[str, type[np.generic]] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
FLOATS = ("float64", "float32", "float16", "bfloat16")
CHUNK = 1 << 18  # numbers converted at a time: small enough for the cache, so that a conversion costs no second tensor


@dataclass(frozen=True)
class StoredTensor:
    """A named tensor in a file. Nothing is read until `read` is called, and nothing is kept after."""

    name: str
    """As its file calls it."""
    dtype: str
    """A key of NUMPY, or the file's own word for a dtype that lama cannot read."""
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """The numbers, of this shape, in the numpy dtype NUMPY[dtype]. Raises LamaError."""
    transposed: bool = False
    """The file holds the matrix with its axes exchanged."""

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape of this tensor as its file has it."""
        return shape[::-1] if self.transposed else shape


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return np.dtype(NUMPY[dtype]).itemsize


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; its kind if it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def read_bytes(path: Path, start: int, count: int) -> np.ndarray:
    """`count` bytes of a file from `start`, as uint8. Plain reads: a memory map would count as memory in use.

    Raises LamaError if the file ends before.
    """
    out = np.empty(count, np.uint8)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < count and (n := file.readinto(out.data[done:])):
                done += n
    except OSError as error:
        raise LamaError(f"{path} must be readable; got {error.strerror}") from error
    if done < count:
        raise LamaError(f"{path} must be complete; got {start + done} bytes where {start + count} were declared. Download it again")
    return out


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 is float32's upper half."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, ties to even, as uint16 bits. Not for NaN."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def is_finite(values: np.ndarray, dtype: str) -> bool:
    """No NaN and no infinity among them."""
    if dtype == "bfloat16":
        return bool(((values & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())


def read_weights(stored: StoredTensor, dtype: str) -> np.ndarray:
    """A stored tensor in another float dtype, contiguous; bfloat16 as uint16 bits.

    Raises LamaError naming the tensor if it is not of a float dtype, holds NaN or infinity, or a number too large for `dtype`.
    """
    if stored.dtype not in FLOATS:
        raise LamaError(f"weights must be of a float dtype ({', '.join(FLOATS)}); got {stored.dtype} for {stored.name}")
    source = np.asarray(stored.read(), order="C")
    target = source if stored.dtype == dtype else np.empty(source.shape, NUMPY[dtype])
    flat_source, flat_target = source.reshape(-1), target.reshape(-1)
    for start in range(0, source.size, CHUNK):
        values = flat_source[start : start + CHUNK]
        if not is_finite(values, stored.dtype):
            raise LamaError(f"weights must be finite; got NaN or infinity in {stored.name}. The checkpoint is damaged")
        if target is source:
            continue
        if stored.dtype == "bfloat16":
            values = bfloat16_to_float32(values)
        with np.errstate(over="ignore"):
            new = float32_to_bfloat16(values.astype(np.float32)) if dtype == "bfloat16" else values.astype(NUMPY[dtype])
        if not is_finite(new, dtype):
            largest = np.abs(values).max()
            raise LamaError(f"weights must fit {dtype}; got {largest:.3g} in {stored.name}. Load it as float32 or bfloat16")
        flat_target[start : start + CHUNK] = new
    return target
