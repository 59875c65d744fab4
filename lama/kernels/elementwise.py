"""Softmax, GELU and sums with gradients; tinygrad would compute exponentials one number at a time."""

import math
from dataclasses import dataclass

from tinygrad import Tensor, UOp

from lama.kernels.dropout import Dropped
from lama.kernels.embedding import Embedded, PositionRows
from lama.runtime.fusion import Producer, computed, producer_of, remember
from lama.runtime.kernel import Gradients, are_fast_floats, inputs_of, make_kernel, result_of, slices_for
from lama.runtime.strides import shape_of


@dataclass(frozen=True)
class Sum(Producer):
    """x + y, not computed yet: see `add_layernorm`."""

    x: UOp
    y: UOp
    dropped: Dropped | None
    """The producer of y, if that is dropout."""


def softmax(x: Tensor) -> Tensor | None:
    """`ops.softmax` by a kernel, or None."""
    return _softmax(False, x) if are_fast_floats(x) else None


def gelu(x: Tensor) -> Tensor | None:
    """`ops.gelu` by a kernel, if possible that of the product x as well, or None."""
    if not are_fast_floats(x):
        return None
    producer = producer_of(x, Producer)
    fused = None if producer is None else producer.with_gelu()
    return _gelu(False, x) if fused is None else fused.reshape(x.shape)


def gelu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient with respect to x, from `grad`, that of gelu(x)."""
    return _gelu(True, x, grad)


def add(x: Tensor, y: Tensor) -> Tensor | None:
    """`ops.add` by the kernel that makes y, or by that of a later norm, or None."""
    embedded, rows = producer_of(x, Embedded), producer_of(y, PositionRows)
    if embedded is not None and rows is not None and (fused := embedded.with_rows(rows)) is not None:
        return fused.reshape(x.shape)
    if x.shape != y.shape or not are_fast_floats(x, y):
        return None
    x, producer = computed(x), producer_of(y, Producer)
    if producer is not None and (fused := producer.with_residual(x)) is not None:
        return fused.reshape(y.shape)
    return remember((x + y).contiguous(), Sum(x.uop, y.uop, producer_of(y, Dropped)))


def _softmax(backward: bool, x: Tensor, *inputs: Tensor) -> Tensor:
    *lead, n = shape_of(x)
    rows = math.prod(lead)
    macros = {"ROWS": rows, "N": n, "BACKWARD": backward}
    kernel = make_kernel("softmax.c", macros, slices=min(rows, slices_for(rows * n)))
    return kernel(shape_of(x), x, *inputs, gradient=None if backward else _softmax_gradient)


def _softmax_gradient(grad: UOp, call: UOp) -> Gradients:
    p = result_of(call)
    return None, _softmax(True, p, Tensor(grad)).uop


def _gelu(backward: bool, x: Tensor, *inputs: Tensor) -> Tensor:
    n = math.prod(shape_of(x))
    kernel = make_kernel("gelu.c", {"N": n, "BACKWARD": backward}, slices=slices_for(n))
    return kernel(shape_of(x), x, *inputs, gradient=None if backward else _gelu_gradient)


def _gelu_gradient(grad: UOp, call: UOp) -> Gradients:
    (x,) = inputs_of(call)
    return None, gelu_gradient(x, Tensor(grad)).uop
