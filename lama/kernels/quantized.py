"""Weights of 8 or 4 bits: how they are rounded, how they lie in memory, and the kernels that read them.

32 weights of a row, a group, share a scale: weight = scale · integer. A row is padded with zeros to whole cache lines,
64 weights of 8 bits or 128 of 4. Activations stay in float32 in products of a few rows: see integers.py for those of more.
"""

import math
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from lama.kernels.pool import on_threads
from lama.kernels.program import Kernel, is_fast, slices_for

GROUP = 32  # weights that share a scale
LINE = 64  # bytes that rows are padded to multiples of
CANDIDATES = tuple(float(steps) for steps in np.linspace(6.8, 9, 6, dtype=np.float32))
"""For 4 bits: the integers, negated, to which a group's largest weight is mapped in turn. With 12 the error is 0.2 % less."""
CHUNK = 1 << 16  # weights rounded at a time: small enough for the cache


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix (d_out, d_in) of small integers and their scales. Its tensors are parameters: they are in the state dict."""

    values: Tensor
    """(d_out, bytes of a row): int8; or uint8, two weights + 8 in each, the first in the lower half."""
    scales: Tensor
    """(d_out, groups of a row), float16; 0 for a group of padding."""
    d_in: int

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == dtypes.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), self.d_in

    @property
    def dtype(self) -> DType:
        """Of the numbers that it stands for."""
        return dtypes.float32

    @property
    def device(self) -> str:
        return str(self.values.device)

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, rows: slice | Tensor) -> "Quantized":
        return Quantized(self.values[rows], self.scales[rows], self.d_in)

    def float(self) -> Tensor:
        """The matrix in float32, by tinygrad's own operations."""
        values = self.values
        if self.bits == 4:
            values = Tensor.stack(values & 15, values >> 4, dim=-1).flatten(-2).cast(dtypes.int8) - 8
        lead = values.shape[:-1]
        grouped = values.reshape(*lead, -1, GROUP).cast(dtypes.float32) * self.scales.float().unsqueeze(-1)
        return grouped.flatten(len(lead))[..., : self.d_in]

    def tensors(self) -> list[Tensor]:
        """What a kernel reads of it, in this order."""
        return [self.values, self.scales]

    def macros(self) -> tuple[tuple[str, str | int], ...]:
        """How a kernel is to read it."""
        size = int(self.values.shape[-1])
        return ("BITS", self.bits), ("ROW_BYTES", size), ("GROUPS", size * 8 // self.bits // GROUP)


def row_sizes(d_in: int, bits: int) -> tuple[int, int]:
    """(bytes of the values, groups) of a row of d_in weights."""
    size = -(-d_in * bits // (8 * LINE)) * LINE
    return size, size * 8 // bits // GROUP


def empty(d_out: int, d_in: int, bits: int, device: str | None = None) -> Quantized:
    """One that is not filled."""
    size, groups = row_sizes(d_in, bits)
    values = Tensor.empty(d_out, size, dtype=dtypes.int8 if bits == 8 else dtypes.uint8, device=device)
    return Quantized(values, Tensor.empty(d_out, groups, dtype=dtypes.float16, device=device), d_in)


def quantize(weight: Tensor, bits: int) -> Quantized:
    """A stored float32 matrix (d_out, d_in) rounded to nearest.

    8 bits: the scale is the group's largest magnitude / 127. 4 bits: of some scales that map the largest weight to
    -9 to -6.8, each then moved to where the squared error is least, the best. A scale too large for float16
    becomes infinite: for the caller to refuse.
    """
    d_out, d_in = (int(n) for n in weight.shape)
    if not is_fast(weight):
        values, scales = (Tensor(part, device=weight.device) for part in quantize_array(weight.numpy(), bits))
        return Quantized(values, scales, d_in)
    quantized = empty(d_out, d_in, bits, str(weight.device))
    candidates = ", ".join(f"{steps!r}f" for steps in CANDIDATES)
    macros = (*quantized.macros(), ("ROWS", d_out), ("K", d_in), ("CANDIDATES", candidates))
    slices = min(d_out, slices_for(0.3 * d_out * d_in))
    kernel = Kernel(f"lama_quantize_{bits}_{d_out}_{d_in}", "quantize.c", macros, slices=slices)
    values, scales = kernel.into(quantized.tensors(), weight)
    return Quantized(values, scales, d_in)


def quantize_array(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`quantize` in numpy: (values, scales)."""
    d_out, d_in = weights.shape
    size, groups = row_sizes(d_in, bits)
    values, scales = np.zeros((d_out, size), np.int8 if bits == 8 else np.uint8), np.empty((d_out, groups), np.float16)
    rows = max(1, CHUNK // d_in)

    def part(start: int) -> None:
        chunk = np.zeros((len(weights[start : start + rows]), groups * GROUP), np.float32)
        chunk[:, :d_in] = weights[start : start + rows]
        integers, scales[start : start + rows] = (_round_8 if bits == 8 else _round_4)(chunk.reshape(len(chunk), groups, GROUP))
        integers = integers.reshape(len(chunk), -1)
        values[start : start + rows] = integers if bits == 8 else integers[:, ::2] + 8 | integers[:, 1::2] + 8 << 4

    on_threads(part, range(0, d_out, rows))
    return values, scales


def _round_8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., GROUP) -> integers of the same shape, and scales (...)."""
    with np.errstate(over="ignore"):
        scales = (np.maximum(x.max(-1), -x.min(-1)) / 127).astype(np.float16)
    return _integers(x, _inverse(scales), -127, 127).astype(np.int8), scales


def _round_4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As above. With q the integers, the best scale is Σxq / Σq², and the error that it leaves Σx² - (Σxq)² / Σq²."""
    extreme = np.where(x.max(-1) > -x.min(-1), x.max(-1), x.min(-1))
    best, scales = np.full(extreme.shape, -1, np.float32), np.zeros_like(extreme)
    for steps in CANDIDATES:
        q = _integers(x, np.float32(-steps) * _inverse(extreme), -8, 7)
        xq, qq = (x * q).sum(-1), (q * q).sum(-1)
        gain = xq * xq / np.maximum(qq, 1)
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scales, xq / np.maximum(qq, 1), where=better)
    with np.errstate(over="ignore"):
        scales = scales.astype(np.float16)
    return _integers(x, _inverse(scales), -8, 7).astype(np.uint8), scales


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 for 0."""
    x = x.astype(np.float32)
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def _integers(x: np.ndarray, inverse: np.ndarray, least: int, most: int) -> np.ndarray:
    return np.clip(np.rint(x * inverse[..., None]), least, most)


def dequantized(weight: Quantized) -> Tensor:
    """The matrix in float32."""
    if not is_fast(*weight.tensors()):
        return weight.float()
    rows, d_in = weight.shape
    macros = (*weight.macros(), ("ROWS", rows), ("K", d_in))
    slices = min(rows, slices_for(0.3 * rows * d_in))
    name = f"lama_dequantize_{weight.bits}_{rows}_{d_in}"
    return Kernel(name, "dequantize.c", macros, slices=slices, headers=("quantized.h",))((rows, d_in), *weight.tensors())
