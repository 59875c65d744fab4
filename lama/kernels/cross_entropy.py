"""Cross-entropy with its gradient; tinygrad would compare every token of the vocabulary with every target."""

import functools
import math

from tinygrad import Tensor, UOp, dtypes

from lama.runtime.kernel import (
    Gradient,
    Gradients,
    Macros,
    c_float,
    inputs_of,
    is_fast,
    make_kernel,
    slices_for,
)
from lama.runtime.strides import shape_of


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor | None:
    """`ops.cross_entropy` by a kernel, or None."""
    if logits.dtype != dtypes.float32 or targets.shape != logits.shape[:-1] or not is_fast(logits, targets):
        return None
    return _kernel(logits, targets.cast(dtypes.int32), None, smoothing)


def _kernel(logits: Tensor, targets: Tensor, grad: Tensor | None, smoothing: float) -> Tensor:
    """The losses; or, given their gradient `grad`, the gradient of the logits."""
    *lead, n = shape_of(logits)
    rows, backward = math.prod(lead), grad is not None
    macros: Macros = {"ROWS": rows, "N": n, "SMOOTHING": c_float(smoothing), "BACKWARD": backward}
    kernel = make_kernel("cross_entropy.c", macros, slices=min(rows, slices_for(1.5 * rows * n)))
    if grad is not None:
        return kernel(shape_of(logits), logits, targets, grad)
    return kernel(shape_of(targets), logits, targets, gradient=_gradient_for(smoothing))


@functools.cache
def _gradient_for(smoothing: float) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> Gradients:
        logits, targets = inputs_of(call)
        return None, _kernel(logits, targets, Tensor(grad), smoothing).uop, None

    return gradient
