"""Products of integers: quantised weights by activations of 8 bits, with a scale for each group of 32.

The speed of a product of many rows is limited by arithmetic. Some processors multiply four times as many
bytes as floats in the same time. A product of few rows is limited by memory: see matvec.py. The rounding is
the same everywhere; without such an instruction, and on other devices, the rounded numbers are multiplied as
floats.
"""

import functools

from tinygrad import Tensor, UOp, dtypes

from lama.host import may_use_amx
from lama.kernels.quantized import GROUP, Quantized
from lama.runtime.kernel import (
    Gradient,
    Gradients,
    Kernel,
    Macros,
    are_fast_floats,
    finds_instruction,
    make_kernel,
    slices_for,
)
from lama.runtime.strides import shape_of
from lama.runtime.threads import threads

OPERATIONS = 300  # of a core in a nanosecond, roughly
LEAST = 64  # rows or columns of a tile, at least, since each tile packs its own inputs
PARTS = 2  # tiles for each thread, so that a late thread does not delay the others for long


def round_activations(x: Tensor) -> Tensor | None:
    """`ops.round_activations` by a kernel, or None."""
    if not are_fast_floats(x):
        return None
    return _rounding(x, {"FLOATS": True})(shape_of(x), x, gradient=_straight_through)


def integer_product(inputs: dict[str, Tensor], gelu: bool, gradient: Gradient) -> Tensor:
    """a · wᵀ with a, (M, K), rounded first: (M, K) · (N, K) -> (M, N).

    `inputs` are in this order: a; w and scales, those of a `Quantized`; optionally bias (N,), which is added,
    and residual (M, N), which is added after GELU. The kernel has more inputs: a's integers, their scales
    and, if w has minima, the sums of their groups.
    """
    a, w = inputs["a"], inputs["w"]
    (m, k), n = (int(size) for size in a.shape), int(w.shape[0])
    wanted = min(slices_for(2 * m * n * k / OPERATIONS), PARTS * threads() if threads() > 1 else 1)
    parts_n = max(1, min(wanted, n // LEAST))
    parts_m = min(-(-wanted // parts_n), max(1, m // LEAST))
    macros: Macros = {"AMX": may_use_amx(), "PARTS_M": parts_m, "PARTS_N": parts_n, "M": m, "N": n, "K": k}
    weight = Quantized(w, inputs["scales"], k)
    macros |= weight.macros()
    macros |= {"BIAS": "bias" in inputs, "GELU": gelu, "RESIDUAL": "residual" in inputs}
    operations, slices = 2 * m * n * k, parts_m * parts_n
    headers = ("amx.h", "integers.h", "quantized.h")
    kernel = make_kernel("matmul_integers.c", macros, operations=operations, slices=slices, headers=headers)
    return kernel((m, n), *inputs.values(), *_integers(a, weight), gradient=gradient)


def _integers(x: Tensor, weight: Quantized) -> list[Tensor]:
    """x, (M, K), as integers for a product with `weight`, each row padded to whole groups.

    Then the groups' scales, float32, and, if the weight has minima, the groups' sums.
    """
    rows, groups = int(x.shape[0]), -(-int(x.shape[1]) // GROUP)
    integers = Tensor.empty(rows, groups * GROUP, dtype=dtypes.uint8, device=x.device)
    of_groups = [Tensor.empty(rows, groups, device=x.device) for _ in range(1 + weight.has_minima)]
    kernel = _rounding(x, {"FLOATS": False, "BITS": weight.bits, "SUMS": weight.has_minima})
    return kernel.into([integers, *of_groups], x)


def _rounding(x: Tensor, form: Macros) -> Kernel:
    k = int(x.shape[-1])
    rows = int(x.numel()) // k
    macros = {"ROWS": rows, "K": k, **form}
    slices = min(rows, slices_for(0.3 * rows * k))
    return make_kernel("round.c", macros, slices=slices, headers=("integers.h", "rounding.h"))


def _straight_through(grad: UOp, call: UOp) -> Gradients:
    return None, grad


@functools.cache
def multiplies_integers(device: str) -> bool:
    """Whether the processor of this CPU device has an instruction for products of bytes."""
    return finds_instruction(device, "integers.h", "DOT")
