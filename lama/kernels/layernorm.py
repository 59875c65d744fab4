"""Layer normalisation with its gradients: two passes over each row where tinygrad's schedule makes six kernels."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.dropout import Dropped, dropout_macros, site_tensor
from lama.kernels.elementwise import Sum
from lama.kernels.fusion import Record, made, maker
from lama.kernels.program import STORED_TYPES, Gradient, Kernel, inputs_of, is_fast, slices_for
from lama.kernels.views import shape_of


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
    fits = all(t.dtype in STORED_TYPES and t.shape == x.shape[-1:] for t in parameters)
    if not (x.dtype == dtypes.float32 and fits and is_fast(x, *parameters)):
        y = x.float().layernorm(eps=epsilon).cast(x.dtype) * weight
        # Stored, not left lazy: the product that follows would normalise again for each of its outputs.
        return (y if bias is None else y + bias).contiguous()
    summed = maker(x, Sum)
    if summed is not None and summed.stored is not None:
        x = Tensor(summed.stored).reshape(x.shape)
    elif summed is not None and x.ndim > 1:
        return _of_sum(summed, x, weight, bias, epsilon)
    kernel = _kernel(x, epsilon, ("BIAS", len(parameters) - 1))
    y = kernel(shape_of(x), x, *(t.cast(dtypes.float32) for t in parameters), gradient=_gradient_for(epsilon))
    return made(y, Normalised(x.uop, weight.uop, None if bias is None else bias.uop, epsilon))


def layernorm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, others: Tensor | None = None, drop: Dropped | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gradient with respect to layernorm(x, weight, bias, epsilon), taken back to x, weight and bias; and dropout of that of x.

    `others` is the gradient of what else reads x.
    """
    slices, d = _slices(x), x.shape[-1]
    kernel = _kernel(x, epsilon, ("BACKWARD", 1), ("OF_SUM", 1 if others is None else 2), *_drop_macros(x, drop))
    shapes = (x.shape, (slices, 2, d), *([] if drop is None else [x.shape]))
    inputs = [x, weight.cast(dtypes.float32), grad, *([] if others is None else [others]), *_drop_inputs(x, drop)]
    dx, sums, *dh = kernel.into([Tensor.empty(*shape, device=x.device) for shape in shapes], *inputs)
    return dx, sums[:, 0].sum(0), sums[:, 1].sum(0), dh[0] if dh else dx


@functools.cache
def _gradient_for(epsilon: float) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        x, weight, *bias = inputs_of(call)
        dx, dw, db, _ = layernorm_gradients(Tensor(grad), x, weight, epsilon)
        return None, dx.uop, dw.uop, *([db.uop] if bias else [])

    return gradient


def _of_sum(summed: Sum, like: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """The norm of a sum in the shape of `like`; its kernel computes the sum, which is the one that counts from here on."""
    shape, drop = shape_of(like), summed.dropped
    added = summed.y if drop is None else drop.x
    parameters = [weight] if bias is None else [weight, bias]
    kernel = _kernel(like, epsilon, ("BIAS", len(parameters) - 1), ("OF_SUM", 1), *_drop_macros(like, drop))
    # The two results differ in shape: that is how their gradients are told apart.
    outputs = [Tensor.empty(math.prod(shape), device=like.device), Tensor.empty(*shape, device=like.device)]
    inputs = [*(Tensor(u).reshape(shape) for u in (summed.x, added)), *_drop_inputs(like, drop)]
    inputs += [t.cast(dtypes.float32) for t in parameters]
    gradient = _sum_gradient_for(epsilon, None if drop is None else (drop.rate, drop.site))
    y, x = kernel.into(outputs, *inputs, gradient=gradient)
    summed.stored = x.uop
    return y.reshape(shape)


@functools.cache
def _sum_gradient_for(epsilon: float, dropping: tuple[float, int] | None) -> Callable[..., tuple[UOp | None, ...]]:
    def gradient(*grads: UOp, call: UOp | None = None) -> tuple[UOp | None, ...]:
        if call is None:  # tinygrad names it where there are two gradients
            grads, call = grads[:-1], grads[-1]
        x, (_, h, *inputs) = Tensor(call.src[2].after(call)), (Tensor(u) for u in call.src[3:])
        drop = None if dropping is None else Dropped(h.uop, inputs[0].uop, *dropping)
        weight, *bias = inputs if drop is None else inputs[2:]
        of_y, of_x = (next((Tensor(g) for g in grads if g.shape == u.shape), None) for u in call.src[1:3])
        of_y = x.zeros_like().contiguous() if of_y is None else of_y
        dx, dw, db, dh = layernorm_gradients(of_y.reshape(x.shape), x, weight, epsilon, of_x, drop)
        return None, None, dx.uop, dh.uop, *([] if drop is None else [None, None]), dw.uop, *([db.uop] if bias else [])

    return gradient


def _kernel(x: Tensor, epsilon: float, *others: tuple[str, str | int]) -> Kernel:
    """layernorm.c for x; `others` are the macros that are not 0."""
    macros = {"BACKWARD": 0, "BIAS": 0, "OF_SUM": 0, "DROPOUT": 0, **dict(others)}
    sizes = (("ROWS", _rows(x)), ("N", shape_of(x)[-1]), ("EPSILON", f"(float){epsilon!r}"))
    number = epsilon.hex().strip("-").replace(".", "_").replace("+", "").replace("-", "m")
    kind = "_".join(str(macros[name]) for name in ("BACKWARD", "BIAS", "OF_SUM", "DROPOUT"))
    name = f"lama_layernorm_{_rows(x)}_{shape_of(x)[-1]}_{kind}_{number}"
    return Kernel(name, "layernorm.c", (*sizes, *macros.items()), slices=_slices(x))


def _drop_macros(x: Tensor, drop: Dropped | None) -> tuple[tuple[str, str | int], ...]:
    return () if drop is None else (("DROPOUT", 1), *dropout_macros(shape_of(Tensor(drop.x)), drop.rate))


def _drop_inputs(x: Tensor, drop: Dropped | None) -> list[Tensor]:
    return [] if drop is None else [Tensor(drop.key), site_tensor(drop.site, str(x.device))]


def _rows(x: Tensor) -> int:
    return math.prod(shape_of(x)[:-1])


def _slices(x: Tensor) -> int:
    return min(_rows(x), slices_for(1.0 * math.prod(shape_of(x))))
