"""Rotary positions with their gradient; rope.c reads a head's part of a projection in place."""

import functools
import math
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.runtime.kernel import (
    Gradient,
    Gradients,
    Kernel,
    Macros,
    inputs_of,
    is_fast,
    make_kernel,
    slices_for,
)
from lama.runtime.strides import Layout, contiguous_strides, materialise, shape_of, strided_view


@dataclass(frozen=True)
class _Spec:
    """All constants of a kernel."""

    layout: Layout
    """The layout of x, (B, H, T, D)."""
    row: int
    """The numbers of a token in the tensor that x is a view of."""
    rotated: int
    length: int
    positions: int
    """The axes of `positions`: 0 without them, 1 for each row's first position, 2 for every token's."""

    def kernel(self, backward: bool) -> Kernel:
        B, H, T, D = self.layout.shape
        strides = dict(zip(("XB", "XH", "XT"), self.layout.strides, strict=False))
        macros: Macros = {"B": B, "H": H, "T": T, "D": D, "R": self.rotated // 2, "LENGTH": self.length}
        macros |= {
            "X_AT": self.layout.offset,
            "ROW": self.row,
            "AT": self.positions > 0,
            "AT_EACH": self.positions > 1,
            **strides,
        }
        macros["BACKWARD"] = int(backward)
        return make_kernel("rope.c", macros, slices=min(B * T, slices_for(B * H * T * D)))


def rotate(x: Tensor, table: Tensor, positions: Tensor | None) -> Tensor | None:
    """`ops.rotate` by a kernel, or None."""
    numbers = [] if positions is None else [positions.cast(dtypes.int32)]
    if x.ndim != 4 or x.dtype != dtypes.float32 or not is_fast(x, table, *numbers):
        return None
    base, spec = _source(x, table, 0 if positions is None else positions.ndim)
    outputs = [Tensor.empty(*shape_of(x), device=x.device)]
    return spec.kernel(False).into(outputs, base, table, *numbers, gradient=_gradient_for(spec))[0]


def _source(x: Tensor, table: Tensor, positions: int) -> tuple[Tensor, _Spec]:
    """The tensor that the kernel reads: x's base if x is a part of each token's row there, else a copy."""
    (B, H, T, D), (length, rotated) = shape_of(x), shape_of(table)
    base, layout = strided_view(x)
    row = math.prod(shape_of(base)) // (B * T)
    rows = Layout(
        layout.shape,
        layout.offset,
        tuple(0 if n == 1 else stride for n, stride in zip((B, H, T, D), (T * row, D, row, 1), strict=True)),
    )
    if layout != rows or layout.offset + H * D > row or row * B * T != math.prod(shape_of(base)):
        base, row = materialise(x), H * D
        layout = Layout((B, H, T, D), 0, contiguous_strides((B, H, T, D)))
    return base, _Spec(layout, row, rotated, length, positions)


@functools.cache
def _gradient_for(spec: _Spec) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> Gradients:
        base, *others = inputs_of(call)
        (dx,) = spec.kernel(True).into([Tensor.empty(*base.shape, device=base.device)], Tensor(grad), *others)
        return None, dx.uop, *(None for _ in others)

    return gradient
