"""Weights of 8 or 4 bits: their layout in memory, and the kernels that write and read it.

A group of 32 weights of a row shares a scale: weight = scale · integer. Groups from GGUF files may also have
a minimum: weight = scale · integer + minimum. A row is padded with zeros to whole cache lines, 64 weights of
8 bits or 128 of 4.

Files hold one row after the other. In memory TILE rows are interleaved, four bytes of each at a time. A
vector of the processor then holds weights of as many rows, and a product multiplies all of them by the same
activations.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from tinygrad import Tensor, dtypes

from lama.kernels.arrays import write_transposed
from lama.runtime.internals import DType
from lama.runtime.kernel import Macros, is_fast, make_kernel, slices_for
from lama.shapes import Array

if TYPE_CHECKING:
    Slice = slice[int | None, int | None, None]
else:
    Slice = slice

GROUP = 32  # weights that share a scale
LINE = 64  # bytes that rows are padded to multiples of
TILE = 16  # rows that are interleaved
WORD, PAIR = 4, 2  # bytes of a row's values, and of its scales, before those of the next row
BLOCK = 20  # bytes of the scales and minima of eight groups that share d and dmin
CANDIDATES = tuple(float(steps) for steps in np.linspace(6.8, 9, 6, dtype=np.float32))
"""For 4 bits: the values, negated, to which the scales that are tried map a group's largest weight.

With 12 candidates the error would be only 0.2 % smaller.
"""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix (d_out, d_in) of small integers and their scales, both parameters of the state dict."""

    values: Tensor
    """(d_out, bytes of a row): int8; or uint8, two integers in each byte, the first in the lower half.

    A stored integer of 4 bits is the weight's integer + 8; with minima, it is the integer itself, 0 to 15.
    The shape is that of the rows in a file; in memory, `side_by_side` has interleaved TILE of them.
    """
    scales: Tensor
    """(d_out, groups of a row), float16, 0 for a group of padding; with minima in one of two forms.

    Rows are interleaved, two bytes of each at a time. float16: a row's scales, then its minima. uint8: BLOCK
    bytes for eight groups, as in Q4_K: d and dmin in float16, eight bytes s and eight bytes m. A scale is
    d · s, a minimum −dmin · m.
    """
    d_in: int
    rounds: bool = True
    """Whether a product with this matrix first rounds the activations; see `ops.round_activations`."""

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == dtypes.int8 else 4

    @property
    def groups(self) -> int:
        return int(self.values.shape[-1]) * 8 // self.bits // GROUP

    @property
    def in_blocks(self) -> bool:
        """Whether eight groups share d and dmin."""
        return self.scales.dtype == dtypes.uint8

    @property
    def has_minima(self) -> bool:
        return self.in_blocks or int(self.scales.shape[-1]) > self.groups

    @property
    def kind(self) -> str:
        """The bits and the form of the minima, such as int4_minima, for a kernel's label."""
        return f"int{self.bits}" + ("_blocks" if self.in_blocks else "_minima" if self.has_minima else "")

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), self.d_in

    @property
    def dtype(self) -> DType:
        """The dtype of the dequantised weights."""
        return dtypes.float32

    @property
    def device(self) -> str:
        return str(self.values.device)

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, rows: Slice) -> "Quantized":
        """Some rows; start and stop are multiples of TILE, or stop is the end."""
        assert (rows.start or 0) % TILE == 0 and (rows.stop is None or rows.stop % TILE == 0)
        return replace(self, values=self.values[rows], scales=self.scales[rows])

    def in_rows(self) -> tuple[Tensor, Tensor]:
        """The values and scales, one row after the other as in files."""
        return _in_rows(self.values, WORD), _in_rows(self.scales, PAIR)

    def tensors(self) -> list[Tensor]:
        """The inputs of a kernel that reads this matrix, in its order."""
        return [self.values, self.scales]

    def macros(self) -> Macros:
        """The layout, for a kernel that reads this matrix."""
        d_out, size = (int(n) for n in self.values.shape)
        sizes: Macros = {"BITS": self.bits, "D_OUT": d_out, "ROW_BYTES": size, "GROUPS": self.groups}
        return {**sizes, "TILE": TILE, "MINIMA": self.has_minima, "BLOCKS": self.in_blocks}


def row_sizes(d_in: int, bits: int) -> tuple[int, int]:
    """(bytes of the values, groups) of a row of d_in weights."""
    size = -(-d_in * bits // (8 * LINE)) * LINE
    return size, size * 8 // bits // GROUP


def side_by_side(values: Array, scales: Array) -> tuple[Array, Array]:
    """The values and scales of a file, one row after the other, interleaved as in a `Quantized`."""
    return _side_by_side(values, WORD), _side_by_side(scales, PAIR)


def _side_by_side(rows: Array, unit: int) -> Array:
    units = np.ascontiguousarray(rows).view(f"u{unit}")
    out, (_, width) = np.empty_like(units), units.shape
    for start, stop, height in _tiles(len(rows)):
        tiles = units[start:stop].reshape(-1, height, width)
        write_transposed(out[start:stop].reshape(-1, width, height), tiles)
    return out.view(rows.dtype)


def _in_rows(x: Tensor, unit: int) -> Tensor:
    """The reverse of `_side_by_side`."""
    (rows, size), of_unit = (int(n) for n in x.shape), unit // x.dtype.itemsize
    parts = []
    for start, stop, height in _tiles(rows):
        tiles = x[start:stop].reshape(-1, size // of_unit, height, of_unit)
        parts.append(tiles.permute(0, 2, 1, 3).reshape(-1, size))
    return parts[0].cat(*parts[1:])


def _tiles(rows: int) -> list[tuple[int, int, int]]:
    """Whole tiles, then the last one if it is smaller: first row, row after the last, rows of a tile."""
    whole = rows // TILE * TILE
    return [tile for tile in ((0, whole, TILE), (whole, rows, rows - whole)) if tile[1] > tile[0]]


def empty(d_out: int, d_in: int, bits: int, device: str | None = None) -> Quantized:
    """An unfilled matrix."""
    size, groups = row_sizes(d_in, bits)
    values = Tensor.empty(d_out, size, dtype=dtypes.int8 if bits == 8 else dtypes.uint8, device=device)
    return Quantized(values, Tensor.empty(d_out, groups, dtype=dtypes.float16, device=device), d_in)


def quantize(weight: Tensor, bits: int) -> Quantized | None:
    """`ops.quantize` by a kernel, or None."""
    if not is_fast(weight):
        return None
    d_out, d_in = (int(n) for n in weight.shape)
    quantized = empty(d_out, d_in, bits, str(weight.device))
    candidates = ", ".join(f"{steps!r}f" for steps in CANDIDATES)
    macros = {**quantized.macros(), "K": d_in, "CANDIDATES": candidates}
    slices = min(d_out, slices_for(0.3 * d_out * d_in))
    label = f"{bits}_{d_out}_{d_in}"
    kernel = make_kernel("quantize.c", macros, label=label, slices=slices, headers=("quantized.h",))
    values, scales = kernel.into(quantized.tensors(), weight)
    return Quantized(values, scales, d_in)


def dequantize(weight: Quantized) -> Tensor | None:
    """`ops.dequantize` by a kernel, or None."""
    if not is_fast(*weight.tensors()):
        return None
    rows, d_in = weight.shape
    macros = {**weight.macros(), "K": d_in}
    slices = min(rows, slices_for(0.3 * rows * d_in))
    kernel = make_kernel("dequantize.c", macros, slices=slices, headers=("quantized.h",))
    return kernel((rows, d_in), *weight.tensors())
