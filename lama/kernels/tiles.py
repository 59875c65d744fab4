"""Weights of half precision in tiles, in which HEIGHT rows are interleaved, a unit of each at a time.

A vector of the processor then holds weights of several rows, and a product multiplies all of them by the same
activations. Consecutive rows would have to be transposed in registers, which takes longer than reading them.
A unit is one number, or a pair of bfloat16, which some processors multiply at once.

For tinygrad such a matrix is an ordinary tensor (d_out, d_in), a view of its tiles. Kernels look up the
tiles.
"""

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from lama.kernels.arrays import write_transposed
from lama.runtime.buffers import empty, host_array
from lama.runtime.fusion import Producer, producer_of, remember
from lama.runtime.internals import DType
from lama.runtime.kernel import Macros
from lama.shapes import Array

HEIGHT = 32  # two vectors of 16 floats: neither sum has to wait for the other
UNITS = {dtypes.float16: 1, dtypes.bfloat16: 2}
"""The numbers of a unit."""


@dataclass(frozen=True)
class Tiles(Producer):
    """The memory of a matrix (d_out, d_in), of shape (tiles, units of a row, HEIGHT, numbers of a unit).

    The last tile and the last unit of a row are padded with zeros.
    """

    uop: UOp
    shape: tuple[int, int]


def in_tiles(d_out: int, d_in: int, dtype: DType, device: str | None = None) -> Tensor:
    """An unfilled matrix (d_out, d_in) in tiles; `dtype` is one of UNITS."""
    unit = UNITS[dtype]
    tiles = empty(-(-d_out // HEIGHT), -(-d_in // unit), HEIGHT, unit, dtype=dtype, device=device)
    return remember(rows_of(tiles, d_out, d_in), Tiles(tiles.uop, (d_out, d_in)))


def put_in_tiles(rows: Tensor) -> Tensor:
    """A copy in tiles of a realised matrix (d_out, d_in), which is in the host's memory."""
    d_out, d_in = (int(n) for n in rows.shape)
    matrix, source = in_tiles(d_out, d_in, rows.dtype, str(rows.device)), host_array(rows)
    tiles = tiles_of(matrix)
    memory = None if tiles is None else host_array(tiles)
    assert memory is not None and source is not None, "a matrix outside the host's memory"
    write_tiles(memory, 0, source)
    return matrix


def rows_of(tiles: Tensor, d_out: int, d_in: int) -> Tensor:
    """The matrix (d_out, d_in) as a view of its tiles."""
    count, units, height, unit = (int(n) for n in tiles.shape)
    return tiles.permute(0, 2, 1, 3).reshape(count * height, units * unit)[:d_out, :d_in]


def tiles_of(matrix: Tensor) -> Tensor | None:
    """The tiles of which a matrix is a view; None if it has none."""
    found = producer_of(matrix, Tiles)
    return Tensor(found.uop) if found is not None and found.shape == matrix.shape else None


def tile_macros(tiles: Tensor | None) -> Macros:
    """The layout of a matrix in tiles, for a kernel that reads it; no macros for rows."""
    if tiles is None:
        return {}
    return {"TILE": HEIGHT, "UNITS": int(tiles.shape[1]), "UNIT_SIZE": int(tiles.shape[3])}


def write_tiles(tiles: Array, first: int, rows: Array) -> None:
    """Write rows (n, d_in) into a matrix from row `first`, a multiple of HEIGHT, on; pad the last tile."""
    unit, whole = tiles.shape[3], len(rows) // HEIGHT
    if rows.shape[1] % unit:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    words = f"u{unit * rows.itemsize}"
    units = rows.view(words)  # (n, units of a row)
    out = tiles.view(words)[first // HEIGHT :, :, :, 0]  # (tiles, units of a row, HEIGHT)
    write_transposed(out[:whole], units[: whole * HEIGHT].reshape(whole, HEIGHT, units.shape[1]))
    if rest := len(rows) % HEIGHT:
        out[whole] = 0
        out[whole, :, :rest] = units[whole * HEIGHT :].T
