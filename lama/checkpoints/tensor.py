"""Tensors in files: their names, types and shapes, and functions that read them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lama.errors import LamaError, first_line, quoted
from lama.files import AGAIN, quoted_path
from lama.kernels.arrays import assign
from lama.shapes import Array

FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
NUMPY: dict[str, type] = {name: np.dtype(name).type for name in (*FLOATS[:3], *INTEGERS, "bool")}
NUMPY["bfloat16"] = np.uint16  # numpy has no bfloat16: its 16 bits are an unsigned integer
CHUNK = 1 << 18  # elements that are read and converted at a time, so that they stay in the cache
TRANSPOSED_ROWS = 64  # rows that are transposed at a time: twice as fast as numpy's copy of `matrix.T`


@dataclass(frozen=True)
class FileTensor:
    """A named tensor in a file; `read` reads the file at every call."""

    name: str
    """The name in the file."""
    dtype: str
    """A key of NUMPY, int8 or int4 if quantised, or the file's name of a dtype that lama cannot read."""
    shape: tuple[int, ...]
    read: Callable[[], Array]
    """Returns an array of this shape and of the numpy type NUMPY[dtype]. Raises LamaError."""
    transposed: bool = False
    """Whether the file has the matrix with its axes exchanged."""
    read_into: Callable[[int, Array], None] | None = None
    """Fills an array with elements from an index on, in the file's order; None if they are not contiguous."""
    quantized: "tuple[FileTensor, FileTensor] | None" = None
    """The values and scales of a quantised matrix, in rows, for a `lama.kernels.Quantized`."""
    exact: "tuple[FileTensor, FileTensor] | None" = None
    """The same for a matrix that `read` gives as floats, if its type fits lama's without rounding again."""
    stored: str = ""
    """The quantised type in the file, such as Q6_K, of a matrix that `read` gives as floats."""

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape of this tensor with its axes in the file's order."""
        return shape[::-1] if self.transposed else shape

    def parts(self, whole: Array) -> Iterator[tuple[Array, Array]]:
        """Read the tensor in parts: pairs of a part and its view in `whole`, an array of this shape.

        Only one part is in memory at a time. It is read directly into the view if layout and type allow that.
        """
        if self.read_into is None:
            elements = np.asarray(self.read(), order="C").reshape(-1)
            for start in range(0, whole.size, CHUNK):
                yield elements[start : start + CHUNK], whole.reshape(-1)[start : start + CHUNK]
            return
        width = whole.shape[-1] if whole.ndim else 1
        rows = whole.T if self.transposed else whole.reshape(math.prod(whole.shape[:-1]), width)
        columns = rows.shape[1]
        at_once = TRANSPOSED_ROWS if self.transposed else max(1, CHUNK // max(1, columns))
        in_place = not self.transposed and whole.dtype == NUMPY[self.dtype]
        buffer: Array = np.empty((0 if in_place else min(at_once, len(rows)), columns), NUMPY[self.dtype])
        for row in range(0, len(rows), at_once):
            view = rows[row : row + at_once]
            part = view if in_place else buffer[: len(view)]
            self.read_into(row * columns, part)
            yield part, view


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(NUMPY[dtype]).itemsize


def read_bytes(path: Path, start: int, count: int) -> Array:
    """Read `count` bytes of a file from `start` on, as uint8. Raises LamaError if the file is shorter."""
    out = np.empty(count, np.uint8)
    fill_from(path, start, out)
    return out


def fill_from(path: Path, start: int, out: Array) -> None:
    """Fill a contiguous array with a file's bytes from `start` on. Raises LamaError if the file is shorter.

    Files are not mapped into memory. Mapped weights are read a quarter more slowly, because of small pages,
    and may not be aligned. If a mapped file is cut short, the process ends.
    """
    data, done = out.reshape(-1).view(np.uint8).data, 0
    with explained(path, "file"), open(path, "rb", buffering=0) as file:
        file.seek(start)
        while done < len(data) and (n := file.readinto(data[done:])):
            done += n
    if done < len(data):
        sizes = f"it has {start + done} of {start + len(data)} bytes"
        raise LamaError(f"{quoted_path(path)} is incomplete: {sizes}. {AGAIN}")


@contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Turn every error that a damaged file causes into a LamaError. `what` is its format."""
    try:
        yield
    except LamaError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise LamaError(f"{quoted_path(path)} cannot be read: {reason}") from error
    except Exception as error:  # a damaged pickle or archive can raise nearly anything
        reason = f"{first_line(error)}. {AGAIN}"
        raise LamaError(f"{quoted_path(path)} is not a complete {what}: {reason}") from error


def bfloat16_to_float32(bits: Array) -> Array:
    """Convert bfloat16, which is the upper half of a float32, from uint16 bits."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """The nearest bfloat16, ties to even, as uint16 bits. NaN is not supported."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def is_finite(values: Array, dtype: str) -> bool:
    """Whether the values contain neither NaN nor infinity."""
    if dtype == "bfloat16":
        return bool((np.bitwise_and(values, 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())


def check_finite(values: Array, dtype: str, name: str) -> None:
    """Raise LamaError that names the tensor if its weights contain NaN or infinity."""
    if not is_finite(values, dtype):
        got = f"got NaN or infinity in {quoted(name, plain=True)}. The checkpoint is damaged"
        raise LamaError(f"weights must be finite; {got}")


def read_weights(tensor: FileTensor, dtype: str, out: Array | None = None) -> Array:
    """Read a tensor as a float dtype, contiguous, into `out` if given; bfloat16 as uint16 bits.

    With an integer `dtype`, for quantised weights, numbers are not converted. Raises LamaError for other
    dtypes in the file, NaN, infinity, and numbers too large for `dtype`.
    """
    name = quoted(tensor.name, plain=True)
    if dtype not in FLOATS and tensor.dtype != dtype:
        got = f"got {tensor.dtype} for {name}. The checkpoint is damaged"
        raise LamaError(f"quantised weights must be of dtype {dtype}; {got}")
    if dtype in FLOATS and tensor.dtype not in FLOATS:
        dtypes = ", ".join(FLOATS)
        raise LamaError(f"weights must be of a float dtype ({dtypes}); got {tensor.dtype} for {name}")
    if out is None and tensor.read_into is None and tensor.dtype == dtype:
        out = np.ascontiguousarray(tensor.read())
        if dtype in FLOATS:
            check_finite(out, dtype, tensor.name)
        return out
    if out is None:
        out = np.empty(tensor.shape, NUMPY[dtype])
    for values, view in tensor.parts(out):
        if dtype in FLOATS:
            check_finite(values, tensor.dtype, tensor.name)
        if tensor.dtype == dtype:
            if values is not view:
                assign(view, values)
            continue
        if tensor.dtype == "bfloat16":
            values = bfloat16_to_float32(values)
        with np.errstate(over="ignore"):
            if dtype == "bfloat16":
                new = float32_to_bfloat16(values.astype(np.float32))
            else:
                new = values.astype(NUMPY[dtype])
        if not is_finite(new, dtype):
            got = f"got {np.abs(values).max():.3g} in {name}. Load the model as float32 or bfloat16"
            raise LamaError(f"weights must fit {dtype}; {got}")
        assign(view, new)
    return out
