"""C functions of NumPy arrays, for weights that are read from a file; without C, NumPy does the same."""

from lama.runtime.kernel import native
from lama.shapes import Array

WORDS = {2: "unsigned short", 4: "unsigned int"}


def assign(view: Array, values: Array) -> None:
    """Do `view[:] = values`; faster if this transposes a matrix."""
    size, strides = view.itemsize, view.strides
    is_transposed = view.ndim == 2 and strides[0] == size < strides[1]
    is_simple = view.dtype == values.dtype and size in WORDS and values.flags.c_contiguous
    if is_transposed and is_simple and (function := native("transpose.c", WORD=WORDS[size])):
        function(view.ctypes.data, values.ctypes.data, 1, *values.shape, strides[1] // size)
    else:
        view[:] = values


def write_transposed(out: Array, matrices: Array) -> None:
    """Write (n, rows, columns) as (n, columns, rows); both are contiguous, of integers of 2 or 4 bytes."""
    assert out.flags.c_contiguous and matrices.flags.c_contiguous and out.dtype == matrices.dtype
    if function := native("transpose.c", WORD=WORDS[out.itemsize]):
        function(out.ctypes.data, matrices.ctypes.data, *matrices.shape, matrices.shape[1])
    else:
        out[:] = matrices.transpose(0, 2, 1)


def write_pairs(out: Array, blocks: Array, at: int, width: int) -> bool:
    """Write the 4-bit weights of blocks (n, bytes of a block) into rows (rows, bytes); False without C.

    A block's weights begin at byte `at`. The lower halves of `width` bytes hold `width` weights, their upper
    halves the next `width`, and so on.
    """
    function = native("pairs.c", SIZE=blocks.shape[1], AT=at, WIDTH=width)
    if function is None or not blocks.flags.c_contiguous or out.strides[1] != 1:
        return False
    rows = len(out)
    function(out.ctypes.data, blocks.ctypes.data, rows, len(blocks) // max(1, rows), out.strides[0])
    return True
