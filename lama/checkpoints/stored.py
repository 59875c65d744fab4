"""A tensor that lies in a file: what it is, and how to read it when its turn comes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lama.errors import LamaError, quoted
from lama.files import AGAIN, quoted_path

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
CHUNK = 1 << 18  # numbers read and converted at a time: small enough for the cache, so that neither costs a second tensor
TRANSPOSED_ROWS = 64  # of a matrix that is transposed: twice as fast as numpy's own copy of `matrix.T`


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
    read_into: Callable[[int, np.ndarray], None] | None = None
    """Where the file holds the numbers one after the other: fill an array with those from the given one on, in the file's order."""

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape of this tensor as its file has it."""
        return shape[::-1] if self.transposed else shape

    def parts(self, whole: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The numbers part by part, each with its place in `whole`, an array of this shape; only a part is in memory.

        A part is read straight into its place where it can lie there as the file has it.
        """
        if self.read_into is None:
            numbers = np.asarray(self.read(), order="C").reshape(-1)
            for start in range(0, whole.size, CHUNK):
                yield numbers[start : start + CHUNK], whole.reshape(-1)[start : start + CHUNK]
            return
        rows = whole.T if self.transposed else whole.reshape(-1, whole.shape[-1] if whole.ndim else 1)
        columns = rows.shape[1]
        at_once = TRANSPOSED_ROWS if self.transposed else max(1, CHUNK // max(1, columns))
        in_place = not self.transposed and whole.dtype == NUMPY[self.dtype]
        space = np.empty((0 if in_place else min(at_once, len(rows)), columns), NUMPY[self.dtype])
        for row in range(0, len(rows), at_once):
            place = rows[row : row + at_once]
            part = place if in_place else space[: len(place)]
            self.read_into(row * columns, part)
            yield part, place


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return np.dtype(NUMPY[dtype]).itemsize


def read_bytes(path: Path, start: int, count: int) -> np.ndarray:
    """`count` bytes of a file from `start`, as uint8. Raises LamaError if the file ends before."""
    out = np.empty(count, np.uint8)
    fill_from(path, start, out)
    return out


def fill_from(path: Path, start: int, out: np.ndarray) -> None:
    """Fill a contiguous array with a file's bytes from `start`. Plain reads: a memory map would count as memory in use.

    Raises LamaError if the file ends before.
    """
    data, done = out.reshape(-1).view(np.uint8).data, 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while done < len(data) and (n := file.readinto(data[done:])):
                done += n
    except OSError as error:
        raise LamaError(f"{quoted_path(path)} must be readable; got {error.strerror}") from error
    if done < len(data):
        sizes = f"{start + done} bytes where {start + len(data)} were declared"
        raise LamaError(f"{quoted_path(path)} must be complete; got {sizes}. {AGAIN}")


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


def read_weights(stored: StoredTensor, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """A stored tensor in another float dtype, contiguous; bfloat16 as uint16 bits. In `out`, where it is given.

    With an integer `dtype`, that of quantised weights, it is read as it is. Raises LamaError naming the tensor if it is not of
    a float dtype, or not of that integer one, holds NaN or infinity, or a number too large for `dtype`.
    """
    name = quoted(stored.name, plain=True)
    if dtype not in FLOATS and stored.dtype != dtype:
        raise LamaError(f"quantised weights must be of dtype {dtype}; got {stored.dtype} for {name}. The checkpoint is damaged")
    if dtype in FLOATS and stored.dtype not in FLOATS:
        raise LamaError(f"weights must be of a float dtype ({', '.join(FLOATS)}); got {stored.dtype} for {name}")
    if out is None:
        out = np.empty(stored.shape, NUMPY[dtype])
    for values, place in stored.parts(out):
        if dtype in FLOATS and not is_finite(values, stored.dtype):
            raise LamaError(f"weights must be finite; got NaN or infinity in {name}. The checkpoint is damaged")
        if stored.dtype == dtype:
            if values is not place:
                place[:] = values
            continue
        if stored.dtype == "bfloat16":
            values = bfloat16_to_float32(values)
        with np.errstate(over="ignore"):
            new = float32_to_bfloat16(values.astype(np.float32)) if dtype == "bfloat16" else values.astype(NUMPY[dtype])
        if not is_finite(new, dtype):
            largest = np.abs(values).max()
            raise LamaError(f"weights must fit {dtype}; got {largest:.3g} in {name}. Load it as float32 or bfloat16")
        place[:] = new
    return out
