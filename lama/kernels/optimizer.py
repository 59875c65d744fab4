"""Kernels of the optimizer: the sum of the gradients' squares, and AdamW's update of one parameter."""

import math
from collections.abc import Sequence

from tinygrad import Tensor

from lama.runtime.kernel import Macros, are_fast_floats, c_float, make_kernel, slices_for
from lama.runtime.strides import shape_of

PARTS = 16  # that a tensor's squares are summed in


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor | None:
    """`ops.sum_of_squares` by kernels; None where there are none for these."""
    if not are_fast_floats(*tensors):
        return None
    sums = Tensor.zeros(PARTS, device=tensors[0].device).contiguous()
    for tensor in tensors:
        n = math.prod(shape_of(tensor))
        kernel = make_kernel("squares.c", {"N": n, "PARTS": PARTS}, slices=min(PARTS, slices_for(0.4 * n)))
        sums = kernel((PARTS,), sums, tensor)
    return sums.sum(keepdim=True)


def adamw(
    parameter: Tensor,
    m: Tensor,
    v: Tensor,
    gradient: Tensor,
    scalars: Tensor,
    scale: Tensor,
    beta1: float,
    beta2: float,
    decay: float,
    epsilon: float,
) -> list[Tensor] | None:
    """`ops.adamw` by a kernel; None where there is none for these."""
    tensors = (parameter, m, v, gradient, scalars, scale)
    one_shape = all(t.shape == parameter.shape for t in (m, v, gradient))
    if not (one_shape and are_fast_floats(*tensors)):
        return None
    n = math.prod(shape_of(parameter))
    constants = {"BETA1": beta1, "BETA2": beta2, "DECAY": decay, "EPSILON": epsilon}
    macros: Macros = {"N": n, **{name: c_float(x) for name, x in constants.items()}}
    kernel = make_kernel("adamw.c", macros, label=str(n), slices=slices_for(2.0 * n), in_place=True)
    return kernel.into([parameter, m, v], gradient, scalars, scale)
