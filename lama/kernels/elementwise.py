"""Softmax, GELU and sums with their gradients: tinygrad computes their exponentials one number at a time."""

import math
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.dropout import Dropped
from lama.kernels.fusion import Record, made, maker, then
from lama.kernels.program import Kernel, inputs_of, is_fast, result_of, slices_for
from lama.kernels.views import shape_of


def softmax(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) over the last axis, in float32, any shape."""
    if not (x.dtype == dtypes.float32 and is_fast(x)):
        return x.float().softmax(-1)
    return _softmax_kernel(x, backward=False)(shape_of(x), x, gradient=_softmax_gradient)


def gelu(x: Tensor) -> Tensor:
    """x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, any shape."""
    if not (x.dtype == dtypes.float32 and is_fast(x)):
        return x.gelu()
    fused = then(x, "gelu")
    return _gelu_kernel(x, backward=False)(shape_of(x), x, gradient=_gelu_gradient) if fused is None else fused


def gelu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """A gradient with respect to gelu(x), taken back to x."""
    return _gelu_kernel(x, backward=True)(shape_of(x), x, grad)


@dataclass
class Sum(Record):
    """x + y, y dropped on the way or not. A norm that follows computes the sum, too, and then `stored` is its sum."""

    x: UOp
    y: UOp
    dropped: Dropped | None
    stored: UOp | None = None


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, stored: not computed again by each kernel that reads it. Two tensors of one shape."""
    if not (x.shape == y.shape and x.dtype == y.dtype == dtypes.float32 and is_fast(x, y)):
        return (x + y).contiguous()
    earlier = maker(x, Sum)
    if earlier is not None and earlier.stored is not None:
        x = Tensor(earlier.stored).reshape(x.shape)
    fused = then(y, "add", x)
    return made((x + y).contiguous(), Sum(x.uop, y.uop, maker(y, Dropped))) if fused is None else fused


def _softmax_kernel(x: Tensor, backward: bool) -> Kernel:
    *lead, n = shape_of(x)
    rows = math.prod(lead)
    macros = (("ROWS", rows), ("N", n), ("BACKWARD", int(backward)))
    return Kernel(f"lama_softmax_{rows}_{n}_{backward:d}", "softmax.c", macros, slices=min(rows, slices_for(1.0 * rows * n)))


def _gelu_kernel(x: Tensor, backward: bool) -> Kernel:
    n = math.prod(shape_of(x))
    return Kernel(f"lama_gelu_{n}_{backward:d}", "gelu.c", (("N", n), ("BACKWARD", int(backward))), slices=slices_for(1.0 * n))


def _softmax_gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    p = result_of(call)
    return None, _softmax_kernel(p, backward=True)(shape_of(p), p, Tensor(grad)).uop


def _gelu_gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    (x,) = inputs_of(call)
    return None, gelu_gradient(x, Tensor(grad)).uop
