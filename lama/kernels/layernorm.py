"""LayerNorm and RMSNorm with gradients, in two passes over a row; tinygrad's schedule has six kernels."""

import functools
import math
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.dropout import Dropped
from lama.kernels.elementwise import Sum
from lama.runtime.fusion import Producer, computed, producer_of, remember, remember_computed
from lama.runtime.kernel import (
    C_TYPES,
    Gradient,
    GradientOfTwo,
    Gradients,
    Kernel,
    Macros,
    c_float,
    inputs_of,
    is_fast,
    make_kernel,
    result_of,
    slices_for,
)
from lama.runtime.strides import shape_of


@dataclass(frozen=True)
class Normalised(Producer):
    """A norm of x. The kernel of a product with few rows can normalise them itself."""

    x: UOp
    weight: UOp
    bias: UOp | None
    epsilon: float
    rms: bool


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor | None:
    """`ops.layernorm` by a kernel, which also computes x if that is a sum, or None."""
    return _norm(x, [weight] if bias is None else [weight, bias], epsilon, False)


def rmsnorm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor | None:
    """`ops.rmsnorm` by the kernel of `layernorm`, or None."""
    return _norm(x, [weight], epsilon, True)


def _norm(x: Tensor, parameters: list[Tensor], epsilon: float, rms: bool) -> Tensor | None:
    fits = all(t.dtype in C_TYPES and t.shape == x.shape[-1:] for t in parameters)
    if not (x.dtype == dtypes.float32 and fits and is_fast(x, *parameters)):
        return None
    parts = producer_of(x, Sum)
    if parts is not None and x.ndim > 1:
        total, y = add_layernorm(parts, shape_of(x), parameters, epsilon, rms)
        remember_computed(x, total)
        return y
    x = computed(x)
    kernel = _kernel(x, epsilon, BIAS=len(parameters) - 1, RMS=int(rms))
    y = kernel(shape_of(x), x, *_widened(parameters), gradient=_gradient_for(epsilon, rms))
    weight, *bias = (t.uop for t in parameters)
    return remember(y, Normalised(x.uop, weight, bias[0] if bias else None, epsilon, rms))


def add_layernorm(
    parts: Sum, shape: tuple[int, ...], parameters: list[Tensor], epsilon: float, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum x + y, or x + dropout(h), and its norm, by one kernel; `parameters` are weight and bias."""
    drop = parts.dropped
    x, h = (Tensor(u).reshape(shape) for u in (parts.x, parts.y if drop is None else drop.x))
    kernel = _kernel(x, epsilon, drop, BIAS=len(parameters) - 1, OF_SUM=1, RMS=int(rms))
    # The two results differ in shape, so that their gradients can be distinguished.
    outputs = [Tensor.empty(math.prod(shape), device=x.device), Tensor.empty(*shape, device=x.device)]
    inputs = [x, h, *([] if drop is None else drop.inputs()), *_widened(parameters)]
    gradient = _sum_gradient_for(epsilon, rms, None if drop is None else (drop.rate, drop.site))
    y, total = kernel.into(outputs, *inputs, gradient=gradient)
    return total, y.reshape(shape)


def layernorm_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    others: Tensor | None = None,
    drop: Dropped | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias from that of layernorm(x, ...), and x's with the dropout `drop`.

    `others` is the gradient from all other readers of x.
    """
    slices = _slices(x)
    kernel = _kernel(x, epsilon, drop, BACKWARD=1, OTHERS=int(others is not None), RMS=int(rms))
    inputs = [x, *_widened([weight]), grad]
    outputs = [Tensor.empty(*x.shape, device=x.device), Tensor.empty(slices, 2, x.shape[-1], device=x.device)]
    if others is not None:
        inputs.append(others)
    if drop is not None:
        inputs += drop.inputs()
        outputs.append(Tensor.empty(*x.shape, device=x.device))
    dx, sums, *dh = kernel.into(outputs, *inputs)
    return dx, sums[:, 0].sum(0), sums[:, 1].sum(0), dh[0] if dh else dx


@functools.cache
def _gradient_for(epsilon: float, rms: bool) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> Gradients:
        x, weight, *bias = inputs_of(call)
        dx, dw, db, _ = layernorm_gradients(Tensor(grad), x, weight, epsilon, rms=rms)
        return None, dx.uop, dw.uop, *(db.uop for _ in bias)

    return gradient


@functools.cache
def _sum_gradient_for(epsilon: float, rms: bool, dropping: tuple[float, int] | None) -> GradientOfTwo:
    def gradient(*grads: UOp, call: UOp | None = None) -> Gradients:
        if call is None:
            grads, call = grads[:-1], grads[-1]
        x, (_, h, *inputs) = result_of(call, 1), inputs_of(call, 2)
        drop = None
        if dropping is not None:
            drop = Dropped(h.uop, inputs[0].uop, *dropping)
            inputs = inputs[2:]
        weight, *bias = inputs
        of_y, of_x = (next((Tensor(g) for g in grads if g.shape == u.shape), None) for u in call.src[1:3])
        of_y = x.zeros_like().contiguous() if of_y is None else of_y
        dx, dw, db, dh = layernorm_gradients(of_y.reshape(x.shape), x, weight, epsilon, of_x, drop, rms)
        of_drop = [] if drop is None else [None, None]
        return None, None, dx.uop, dh.uop, *of_drop, dw.uop, *(db.uop for _ in bias)

    return gradient


def _kernel(x: Tensor, epsilon: float, drop: Dropped | None = None, **flags: int) -> Kernel:
    """layernorm.c for x; `flags` are the macros that are not 0."""
    *lead, n = shape_of(x)
    macros: Macros = {"ROWS": math.prod(lead), "N": n, "EPSILON": c_float(epsilon)}
    defaults: Macros = dict.fromkeys(("BACKWARD", "BIAS", "OF_SUM", "OTHERS", "DROPOUT", "RMS"), 0)
    macros = {**macros, **defaults, **flags, **({} if drop is None else drop.macros())}
    return make_kernel("layernorm.c", macros, slices=_slices(x))


def _slices(x: Tensor) -> int:
    *lead, n = shape_of(x)
    return min(math.prod(lead), slices_for(math.prod(lead) * n))


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    return [t.cast(dtypes.float32) for t in tensors]
