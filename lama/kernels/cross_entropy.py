"""Cross-entropy with its gradient: tinygrad compares every number of the vocabulary with every target."""

import functools
import math

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.program import Gradient, Kernel, inputs_of, is_fast, slices_for
from lama.kernels.views import shape_of


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """−log softmax(logits)[target] of each row, in float32: (..., V), (...) ints -> (...); large logits are safe.

    With `smoothing` ε, the target is 1 − ε of itself and ε of the uniform distribution. Source: Szegedy et al. 2016, section 7.
    """
    if not (logits.dtype == dtypes.float32 and is_fast(logits, targets) and targets.shape == logits.shape[:-1]):
        logits = logits.cast(dtypes.float32)
        one_hot = targets.unsqueeze(-1) == Tensor.arange(logits.shape[-1])  # (..., V), never stored
        picked = one_hot.where(logits, 0).sum(-1)
        expected = picked if smoothing == 0 else (1 - smoothing) * picked + smoothing * logits.mean(-1)
        return logits.logsumexp(-1) - expected
    shape = shape_of(targets)
    return _kernel(logits, smoothing, backward=False)(shape, logits, targets.cast(dtypes.int32), gradient=_gradient_for(smoothing))


def _kernel(logits: Tensor, smoothing: float, backward: bool) -> Kernel:
    *lead, n = (int(size) for size in logits.shape)
    rows = math.prod(lead)
    macros = (("ROWS", rows), ("N", n), ("SMOOTHING", f"(float){smoothing!r}"), ("BACKWARD", int(backward)))
    return Kernel(f"lama_cross_entropy_{rows}_{n}_{backward:d}", "cross_entropy.c", macros, slices=min(rows, slices_for(1.5 * rows * n)))


@functools.cache
def _gradient_for(smoothing: float) -> Gradient:
    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        logits, targets = inputs_of(call)
        shape = shape_of(logits)
        return None, _kernel(logits, smoothing, backward=True)(shape, logits, targets, Tensor(grad)).uop, None

    return gradient
