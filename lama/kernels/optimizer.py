"""Kernels of the optimizers: the sum of the gradients' squares, and the updates of AdamW and Muon."""

import math
from collections.abc import Sequence

from tinygrad import Tensor

from lama.runtime.buffers import empty
from lama.runtime.kernel import Macros, are_fast_floats, c_float, make_kernel, slices_for
from lama.runtime.strides import shape_of

PARTS = 16  # partial sums of a tensor's squares
Run = tuple[int, int, int]
"""Matrices of one shape, one below the other in a tensor: its index, their first row, their count."""


def square_parts(tensors: Sequence[Tensor]) -> Tensor | None:
    """`ops.square_parts` by kernels, or None."""
    if not are_fast_floats(*tensors):
        return None
    sums = Tensor.zeros(PARTS, device=tensors[0].device).contiguous()
    for tensor in tensors:
        n = math.prod(shape_of(tensor))
        kernel = make_kernel("squares.c", {"N": n, "PARTS": PARTS}, slices=min(PARTS, slices_for(0.4 * n)))
        sums = kernel((PARTS,), sums, tensor)
    return sums


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
    factor: float,
) -> list[Tensor] | None:
    """`ops.adamw` by a kernel, or None."""
    tensors = (parameter, m, v, gradient, scalars, scale)
    one_shape = all(t.shape == parameter.shape for t in (m, v, gradient))
    if not (one_shape and are_fast_floats(*tensors)):
        return None
    n = math.prod(shape_of(parameter))
    constants = {"BETA1": beta1, "BETA2": beta2, "DECAY": decay, "EPSILON": epsilon}
    constants["FACTOR"] = factor
    macros: Macros = {"N": n, **{name: c_float(x) for name, x in constants.items()}}
    kernel = make_kernel("adamw.c", macros, label=str(n), slices=slices_for(2.0 * n), in_place=True)
    return kernel.into([parameter, m, v], gradient, scalars, scale)


def muon_directions(
    gradients: Sequence[Tensor],
    runs: Sequence[Run],
    momentum: Tensor,
    scale: Tensor,
    beta: float,
    epsilon: float,
) -> list[Tensor] | None:
    """`ops.muon_directions` by a kernel, or None."""
    if not are_fast_floats(*gradients, momentum, scale):
        return None
    n, size = shape_of(momentum)[0], math.prod(shape_of(momentum)[1:])
    macros = _list(gradients, runs, momentum, "input", "GRADIENTS")
    macros |= {"BETA": c_float(beta), "EPSILON": c_float(epsilon)}
    slices = min(n, slices_for(2.0 * n * size))
    kernel = make_kernel("muon_momentum.c", macros, label=f"{n}_{size}", slices=slices, in_place=True)
    stack = empty(*shape_of(momentum), device=str(momentum.device))
    return kernel.into([stack, momentum], *gradients, scale)


def muon_step(
    parameters: Sequence[Tensor],
    runs: Sequence[Run],
    directions: Tensor,
    scalars: Tensor,
    step: float,
    decay: float,
) -> list[Tensor] | None:
    """`ops.muon_step` by a kernel, or None."""
    if not are_fast_floats(*parameters, directions, scalars):
        return None
    n, size = shape_of(directions)[0], math.prod(shape_of(directions)[1:])
    macros = _list(parameters, runs, directions, "output", "PARAMETERS")
    macros |= {"STEP": c_float(step), "DECAY": c_float(decay)}
    slices = slices_for(0.6 * n * size)
    kernel = make_kernel("muon_step.c", macros, label=f"{n}_{size}", slices=slices, in_place=True)
    return kernel.into(parameters, directions, scalars)


def _list(tensors: Sequence[Tensor], runs: Sequence[Run], stack: Tensor, kind: str, name: str) -> Macros:
    """The macros of a kernel that reads or writes `tensors`: its arguments, and where each matrix begins."""
    n, rows, columns = shape_of(stack)
    starts = [(i, (first + j * rows) * columns) for i, first, count in runs for j in range(count)]
    arguments = ", ".join(f"{kind} t{i}" for i in range(len(tensors)))
    places = ", ".join(f"t{i} + {start}" for i, start in starts)
    return {"SLOTS": n, "N": rows * columns, name: arguments, "PLACES": places}
