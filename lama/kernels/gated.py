"""The gated product of an MLP with its gradients, in one pass over both inputs."""

import functools
import math

from tinygrad import Tensor, UOp

from lama.runtime.kernel import (
    Gradient,
    Gradients,
    Kernel,
    are_fast_floats,
    inputs_of,
    make_kernel,
    slices_for,
)
from lama.runtime.strides import shape_of

GATES = {"silu": 1, "gelu_tanh": 2}  # numbers in gated.c, by the activation function's name


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor | None:
    """`ops.gated` by a kernel, or None."""
    if activation not in GATES or gate.shape != up.shape or not are_fast_floats(gate, up):
        return None
    kernel = _kernel(shape_of(gate), activation, 0)
    return kernel(shape_of(gate), gate, up, gradient=_gradient_for(activation))


def _kernel(shape: tuple[int, ...], activation: str, backward: int) -> Kernel:
    n = math.prod(shape)
    macros = {"N": n, "GATE": GATES[activation], "BACKWARD": backward}
    label = f"{activation}_{n}{'_backward' if backward else ''}"
    return make_kernel("gated.c", macros, label=label, slices=slices_for(n))


@functools.cache
def _gradient_for(activation: str) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> Gradients:
        gate, up = inputs_of(call)
        outputs = [Tensor.empty(*gate.shape, device=gate.device) for _ in range(2)]
        kernel = _kernel(shape_of(gate), activation, 1)
        of_gate, of_up = kernel.into(outputs, gate, up, Tensor(grad))
        return None, of_gate.uop, of_up.uop

    return gradient
