"""Products of integers: quantised weights with activations that are rounded as those are, to 8 bits and a scale for each group of 32.

A product of many rows is bound by arithmetic, and some processors multiply four times as many bytes as floats in the same time.
With few rows it is bound by memory, and activations stay in float32: see `matmul`. What is computed does not depend on the
processor: where it has no such instruction, and on other devices, the same rounded numbers are multiplied as floats.
"""

import functools

from tinygrad import Device, Tensor, UOp, dtypes

from lama.kernels.pool import threads
from lama.kernels.program import Gradient, Kernel, is_fast, slices_for
from lama.kernels.quantized import GROUP, Quantized

OPERATIONS = 300  # that a core does in a nanosecond, about
LEAST = 64  # columns of a part: each packs its own weights
PARTS = 2  # for each thread, so that one that is late does not hold up the others for long
TINY = 1e-30  # a scale not above it is that of a group of zeros


def rounded(x: Tensor) -> Tensor:
    """The numbers that x, (..., K), rounded to 8 bits, stands for: the twin of what `integer_product` does to its activations.

    A gradient passes as if nothing were rounded.
    """
    if x.dtype == dtypes.float32 and is_fast(x):
        return _rounding(x, floats=True)(tuple(int(n) for n in x.shape), x, gradient=_unrounded)
    k = int(x.shape[-1])
    groups = x.float().pad((*[None] * (x.ndim - 1), (0, -k % GROUP))).unflatten(-1, (-1, GROUP))
    scales = groups.abs().max(-1, keepdim=True) * (1 / 127)
    integers = (groups * (scales > TINY).where(1 / scales, 0)).contiguous().round()
    return x + ((integers * scales).flatten(-2)[..., :k].cast(x.dtype) - x).contiguous().detach()


def integer_product(inputs: dict[str, Tensor], gelu: bool, gradient: Gradient) -> Tensor:
    """a · wᵀ with a, (M, K), rounded first: (M, K) · (N, K) -> (M, N).

    `inputs`: a, w and scales, the values and scales of a `Quantized`, first; where there are such, bias (N,), which is added, and
    residual, (M, N), which is added after GELU has been taken. The kernel has two more: a's integers and their scales.
    """
    a, w = inputs["a"], inputs["w"]
    (m, k), n = (int(size) for size in a.shape), int(w.shape[0])
    weight, has_bias, has_residual = Quantized(w, inputs["scales"], k), "bias" in inputs, "residual" in inputs
    wanted = min(slices_for(2 * m * n * k / OPERATIONS), PARTS * threads() if threads() > 1 else 1)
    parts_n = max(1, min(wanted, n // LEAST))
    parts_m = min(-(-wanted // parts_n), max(1, m // LEAST))
    macros = (
        *(("PARTS_M", parts_m), ("PARTS_N", parts_n), ("M", m), ("N", n), ("K", k)),
        *weight.macros(),
        *(("BIAS", int(has_bias)), ("GELU", int(gelu)), ("RESIDUAL", int(has_residual))),
    )
    name = f"lama_integers_{m}_{n}_{k}_{weight.bits}" + "_bias" * has_bias + "_gelu" * gelu + "_residual" * has_residual
    slices, operations = parts_m * parts_n, 2 * m * n * k
    kernel = Kernel(name, "matmul_integers.c", macros, operations=operations, slices=slices, headers=("integers.h",))
    return kernel((m, n), *inputs.values(), *_integers(a), gradient=gradient)


def _integers(x: Tensor) -> list[Tensor]:
    """x, (M, K), as integers, a row of whole groups each, and their scales, float32."""
    rows, groups = int(x.shape[0]), -(-int(x.shape[1]) // GROUP)
    empty = [Tensor.empty(rows, groups * GROUP, dtype=dtypes.uint8, device=x.device), Tensor.empty(rows, groups, device=x.device)]
    return _rounding(x, floats=False).into(empty, x)


def _rounding(x: Tensor, floats: bool) -> Kernel:
    k = int(x.shape[-1])
    rows = int(x.numel()) // k
    macros = (("ROWS", rows), ("K", k), ("FLOATS", int(floats)))
    slices = min(rows, slices_for(0.3 * rows * k))
    return Kernel(f"lama_round_{rows}_{k}_{floats:d}", "round.c", macros, slices=slices, headers=("integers.h",))


def _unrounded(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
    return None, grad


@functools.cache
def multiplies_integers(device: str) -> bool:
    """Whether this CPU device's processor has an instruction for it that its compiler uses: asked of the code that it makes."""
    found = "lama: integers"
    source = Kernel("probe", "integers.h", ()).source() + f'\n#ifdef DOT\nconst char probe[] = "{found}";\n#endif\n'
    compiler = Device[device].compiler
    return compiler is not None and found.encode() in compiler.compile_cached(source)
