"""Layer normalisation with its gradients: two passes over each row where tinygrad's schedule makes six kernels."""

import functools
import math
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.fusion import Record, made
from lama.kernels.program import STORED_TYPES, Gradient, Kernel, inputs_of, is_fast, slices_for


@dataclass(frozen=True)
class Normalised(Record):
    """What was normalised, with what."""

    x: UOp
    weight: UOp
    bias: UOp | None
    epsilon: float


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x − mean) / √(variance + ε) · weight + bias over the last axis; weight and bias (d,), x of any shape (..., d).

    Source: Ba et al. 2016, eq. 4; biased variance. The statistics are float32, the result has x's dtype.
    """
    parameters = [weight] if bias is None else [weight, bias]
    if not (x.dtype == dtypes.float32 and all(t.dtype in STORED_TYPES for t in parameters) and is_fast(x, *parameters)):
        y = x.float().layernorm(eps=epsilon).cast(x.dtype) * weight
        # Stored, not left lazy: the product that follows would normalise again for each of its outputs.
        return (y if bias is None else y + bias).contiguous()
    macros = (*_macros(x, epsilon), ("BACKWARD", 0), ("BIAS", len(parameters) - 1))
    kernel = Kernel(_name(x, epsilon, f"0_{len(parameters) - 1}"), "layernorm.c", macros, slices=_slices(x))
    y = kernel(_shape(x), x, *(t.cast(dtypes.float32) for t in parameters), gradient=_gradient_for(epsilon))
    return made(y, Normalised(x.uop, weight.uop, None if bias is None else bias.uop, epsilon))


def layernorm_gradients(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient with respect to layernorm(x, weight, bias, epsilon), taken back to x, weight and bias."""
    slices, d = _slices(x), x.shape[-1]
    kernel = Kernel(_name(x, epsilon, "1"), "layernorm.c", (*_macros(x, epsilon), ("BACKWARD", 1)), slices=slices)
    outputs = [Tensor.empty(*shape, device=x.device) for shape in (x.shape, (slices, 2, d))]
    dx, sums = kernel.into(outputs, x, weight.cast(dtypes.float32), grad)
    return dx, sums[:, 0].sum(0), sums[:, 1].sum(0)


@functools.cache
def _gradient_for(epsilon: float) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        x, weight, *bias = inputs_of(call)
        dx, dw, db = layernorm_gradients(Tensor(grad), x, weight, epsilon)
        return None, dx.uop, dw.uop, *([db.uop] if bias else [])

    return gradient


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in x.shape)


def _rows(x: Tensor) -> int:
    return math.prod(_shape(x)[:-1])


def _slices(x: Tensor) -> int:
    return min(_rows(x), slices_for(1.0 * math.prod(_shape(x))))


def _macros(x: Tensor, epsilon: float) -> tuple[tuple[str, str | int], ...]:
    return ("ROWS", _rows(x)), ("N", _shape(x)[-1]), ("EPSILON", f"(float){epsilon!r}")


def _name(x: Tensor, epsilon: float, kind: str) -> str:
    return (
        f"lama_layernorm_{_rows(x)}_{_shape(x)[-1]}_{kind}_{epsilon.hex().strip('-').replace('.', '_').replace('+', '').replace('-', 'm')}"
    )
