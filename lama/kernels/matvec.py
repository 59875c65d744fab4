"""Products with a few rows, as in decoding: they take as long as it takes to read the weights, once."""

import math

from tinygrad import Tensor

from lama.kernels.pool import threads
from lama.kernels.program import STORED_TYPES, Gradient, Kernel, slices_for
from lama.kernels.quantized import Quantized

FEW_ROWS = 8
ON_STACK = 16384  # normalised numbers that a slice keeps on its stack: some threads have no more than 512 kB
SHORT = 5_000  # nanoseconds, the least that a slice may take where there is one for each thread
BANDWIDTH = 10  # bytes that a core reads from memory in a nanosecond, about


def shares(nanoseconds: float) -> int:
    """How many slices for a kernel that reads and does little else: as many for each thread, since all read at the same speed;
    and a little work is shared out too, for in decoding no thread sleeps.
    """
    count, slices = threads(), slices_for(nanoseconds)
    return slices // count * count if slices >= count else max(1, min(count, int(nanoseconds / SHORT)))


def matvec(inputs: dict[str, Tensor], gelu: bool = False, epsilon: float = 0.0, gradient: Gradient | None = None) -> Tensor:
    """a · wᵀ over the last axis of both: (..., M, K) · (..., N, K) -> (..., M, N) with M at most FEW_ROWS.

    `inputs`: a and w, first; where there are such, scales, if w is the values of a `Quantized`, bias (N,), which is added,
    residual, (..., M, N), which is added after GELU has been taken, norm_weight and norm_bias, (K,), with which a is
    normalised first.
    """
    a, w = inputs["a"], inputs["w"]
    *lead, m, k = (int(size) for size in a.shape)
    n, batch = int(w.shape[-2]), math.prod(lead)
    types = {name: STORED_TYPES[t.dtype] for name, t in inputs.items() if name not in ("a", "w", "scales", "residual")}
    quantized = Quantized(w, inputs["scales"], k) if "scales" in inputs else None
    weight = STORED_TYPES[w.dtype] if quantized is None else "unsigned char"
    macros: tuple[tuple[str, str | int], ...] = (
        ("BATCH", batch),
        ("M", m),
        ("N", n),
        ("K", k),
        ("WEIGHT", weight),
        *(quantized.macros() if quantized else ()),
        ("GELU", int(gelu)),
        ("RESIDUAL", int("residual" in inputs)),
        ("EPSILON", f"(float){epsilon!r}"),
        *((name.upper(), type_) for name, type_ in types.items()),
    )
    parts = [f"{name}_{type_}" for name, type_ in types.items()] + ["gelu"] * gelu + ["residual"] * ("residual" in inputs)
    if epsilon:
        parts.append(epsilon.hex())
    name = "_".join(["lama_matvec", *map(str, (batch, m, n, k)), f"int{quantized.bits}" if quantized else weight, *parts])
    name = "".join(c if c.isalnum() else "_" for c in name.replace("-", "m"))
    slices = min(n, shares(w.nbytes() / BANDWIDTH))
    kernel = Kernel(name, "matvec.c", macros, operations=2 * batch * m * n * k, slices=slices, headers=("quantized.h",) * bool(quantized))
    return kernel((*lead, m, n), *inputs.values(), gradient=gradient)
