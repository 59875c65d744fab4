"""Layer normalisation with its gradients: two passes over each row where tinygrad's schedule makes six kernels."""

import functools
import math

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.program import Gradient, Kernel, inputs_of, is_fast, slices_for


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x − mean) / √(variance + ε) · weight + bias over the last axis; weight and bias (d,), x of any shape (..., d).

    Source: Ba et al. 2016, eq. 4; biased variance. The statistics are float32, the result has x's dtype.
    """
    parameters = [weight] if bias is None else [weight, bias]
    if not (all(t.dtype == dtypes.float32 for t in (x, *parameters)) and is_fast(x, *parameters)):
        y = x.float().layernorm(eps=epsilon).cast(x.dtype) * weight
        # Stored, not left lazy: the product that follows would normalise again for each of its outputs.
        return (y if bias is None else y + bias).contiguous()
    macros = (*_macros(x, epsilon), ("BACKWARD", 0), ("BIAS", len(parameters) - 1))
    kernel = Kernel(_name(x, epsilon, f"0_{len(parameters) - 1}"), "layernorm.c", macros, slices=_slices(x))
    return kernel(_shape(x), x, *parameters, gradient=_gradient_for(epsilon))


@functools.cache
def _gradient_for(epsilon: float) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        x, weight, *bias = inputs_of(call)
        slices, d = _slices(x), x.shape[-1]
        kernel = Kernel(_name(x, epsilon, "1"), "layernorm.c", (*_macros(x, epsilon), ("BACKWARD", 1)), slices=slices)
        outputs = [Tensor.empty(*shape, device=x.device) for shape in (x.shape, (slices, 2, d))]
        dx, sums = kernel.into(outputs, x, weight, Tensor(grad))
        dw, db = (sums[:, i].sum(0) for i in range(2))
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
