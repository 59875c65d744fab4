"""What an optimizer does with every parameter: the sum of the gradients' squares, and AdamW's update, one kernel for each."""

import math
from collections.abc import Sequence

from tinygrad import Tensor, dtypes

from lama.kernels.program import Kernel, is_fast, slices_for

PARTS = 16  # that a tensor's squares are summed in


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ x² over all numbers of all tensors, float32 (1,): the square of their global norm."""
    if not (all(t.dtype == dtypes.float32 for t in tensors) and is_fast(*tensors)):
        return sum((t.float().square().sum() for t in tensors), Tensor.zeros(1, device=tensors[0].device))
    sums = Tensor.zeros(PARTS, device=tensors[0].device).contiguous()
    for tensor in tensors:
        n = _numel(tensor)
        kernel = Kernel(f"lama_squares_{n}", "squares.c", (("N", n), ("PARTS", PARTS)), slices=min(PARTS, slices_for(0.4 * n)))
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
    epsilon: float = 1e-8,
) -> list[Tensor]:
    """AdamW's update of one parameter and its moments m and v, all of one shape, in place; returns the three, to be realised.

    g = gradient · scale, m = β₁ m + (1 − β₁) g, v = β₂ v + (1 − β₂) g², p = p − r (decay · p + (m / c₁) / (√(v / c₂) + ε)) with
    `scalars` = [r, c₁, c₂] = [rate, 1 − β₁ᵗ, 1 − β₂ᵗ], float32 (3,), and `scale` (1,). Realise first what else reads the parameter.
    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    tensors = (parameter, m, v, gradient, scalars, scale)
    one_shape = all(t.shape == parameter.shape for t in (m, v, gradient))
    if not (one_shape and all(t.dtype == dtypes.float32 for t in tensors) and is_fast(*tensors)):
        rate, correction1, correction2 = (scalars[i : i + 1] for i in range(3))
        g = gradient * scale
        m.assign(beta1 * m + (1 - beta1) * g)
        v.assign(beta2 * v + (1 - beta2) * g.square())
        step = (m / correction1) / ((v / correction2).sqrt() + epsilon)
        parameter.assign((parameter - rate * (step + decay * parameter)).cast(parameter.dtype))
        return [parameter, m, v]
    n = _numel(parameter)
    constants = (("BETA1", beta1), ("BETA2", beta2), ("DECAY", decay), ("EPSILON", epsilon))
    macros: tuple[tuple[str, str | int], ...] = (("N", n), *((name, f"(float){float(value)!r}") for name, value in constants))
    kernel = Kernel(f"lama_adamw_{n}", "adamw.c", macros, slices=slices_for(2.0 * n), in_place=True)
    return kernel.into([parameter, m, v], gradient, scalars, scale)


def _numel(x: Tensor) -> int:
    return math.prod(int(size) for size in x.shape)
