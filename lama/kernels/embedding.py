"""The token embedding: tinygrad's gradient of it is a product with a one-hot matrix over the whole vocabulary."""

import math

from tinygrad import Tensor, UOp, dtypes

from lama.kernels.program import Kernel, inputs_of, is_fast, slices_for


def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """weight[tokens] in float32: (rows, d), (...) ints -> (..., d). A token that is no row gives zeros."""
    if not (weight.dtype == dtypes.float32 and is_fast(weight, tokens)):
        rows = weight[tokens].float()
        # Only negative tokens need this: tinygrad counts them from the end, and gives zeros for those past it.
        return (tokens < 0).unsqueeze(-1).where(0, rows)
    shape = (*(int(size) for size in tokens.shape), int(weight.shape[1]))
    return _kernel(weight, tokens, backward=False)(shape, tokens.cast(dtypes.int32), weight, gradient=_gradient)


def _kernel(weight: Tensor, tokens: Tensor, backward: bool) -> Kernel:
    rows, d = (int(size) for size in weight.shape)
    n = math.prod(int(size) for size in tokens.shape)
    macros = (("ROWS", rows), ("D", d), ("TOKENS", n), ("BACKWARD", int(backward)))
    most = max(1, d // 64) if backward else n  # a slice's rows of the gradient are some cache lines long
    slices = min(most, slices_for(0.5 * d * (n + rows * backward)))
    return Kernel(f"lama_embedding_{rows}_{d}_{n}_{backward:d}", "embedding.c", macros, slices=slices)


def _gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    tokens, weight = inputs_of(call)
    shape = tuple(int(size) for size in weight.shape)
    return None, None, _kernel(weight, tokens, backward=True)(shape, tokens, Tensor(grad)).uop
