"""Products with a few rows, as in decoding: they take as long as reading the weights once."""

import math

from tinygrad import Tensor, dtypes

from lama.host import may_use_amx
from lama.kernels.quantized import Quantized
from lama.kernels.tiles import tile_macros, tiles_of
from lama.runtime.kernel import C_TYPES, Gradient, Macros, c_float, make_kernel, slices_for
from lama.runtime.threads import threads

FEW_ROWS = 24  # the most rows; with more, matmul.c is faster, which packs the weights into panels
FEWEST_ROWS = 8  # the most rows that every slice normalises for itself
ON_STACK = 16384  # the most normalised numbers on the stack of a slice: some threads have only 512 kB
ROUNDED_ON_STACK = 4 * ON_STACK  # the most rounded numbers there, of one, two or four bytes
READING = 2  # slices are this many times longer than others, since each normalises and rounds all rows
SHORT = 5_000  # nanoseconds: the least time of a slice if there is one for each thread
BANDWIDTH = 10  # bytes that a core reads from memory in a nanosecond, roughly


def slices_of_reader(nanoseconds: float) -> int:
    """The number of slices for a kernel that mostly reads: the same number for each thread.

    All threads read at the same speed. Even short work is shared: in decoding no thread sleeps.
    """
    count, slices = threads(), slices_for(nanoseconds / READING)
    return slices // count * count if slices >= count else max(1, min(count, int(nanoseconds / SHORT)))


def matvec(
    inputs: dict[str, Tensor],
    gelu: bool = False,
    epsilon: float = 0.0,
    rms: bool = False,
    rounds: bool = True,
    gradient: Gradient | None = None,
) -> Tensor:
    """a · wᵀ over the last axis of both: (..., M, K) · (..., N, K) -> (..., M, N) with M at most FEW_ROWS.

    `inputs` are in this order, all but a and w optional: a; w; scales, if w is the values of a `Quantized`;
    bias (N,), which is added; residual (..., M, N), which is added after GELU; norm_weight and norm_bias
    (K,), for a LayerNorm of a first, or with `rms` an RMSNorm. With `rounds`, a is rounded if w is quantised;
    if w is bfloat16, a is always rounded to it.
    """
    a, w = inputs["a"], inputs["w"]
    tiles = tiles_of(w)
    *lead, m, k = (int(size) for size in a.shape)
    n, batch = int(w.shape[-2]), math.prod(lead)
    types = {name: C_TYPES.get(x.dtype, "unsigned char") for name, x in inputs.items()}
    types |= {"scales": "unsigned char"} if "scales" in inputs else {}
    layout = tile_macros(tiles)
    headers: tuple[str, ...] = ("amx.h", "bfloat16.h", "tiles.h")
    kind = types["w"] + ("" if tiles is None else "_tiles")
    if "scales" in inputs:
        weight = Quantized(w, inputs["scales"], k)
        layout, kind = weight.macros(), weight.kind
        headers += ("integers.h", "rounding.h", "quantized.h")
        layout |= {"FEW_ROWS": rounds, "FLOATS": not rounds}
        kind += "" if rounds else "_floats"
    flags = {name: name in inputs for name in ("bias", "residual", "norm_weight", "norm_bias")}
    flags |= {"gelu": gelu, "rms": rms}
    macros: Macros = {
        "BATCH": batch,
        "M": m,
        "N": n,
        "K": k,
        "WEIGHT": types["w"],
        "EPSILON": c_float(epsilon),
        "BFLOAT16": w.dtype == dtypes.bfloat16,
        "AMX": w.dtype == dtypes.bfloat16 and may_use_amx(),
    }
    macros |= layout | {name.upper(): flag for name, flag in flags.items()}
    macros["INPUTS"] = ", ".join(f"const {type_} *restrict {name}" for name, type_ in types.items())
    label = "_".join(map(str, [batch, m, n, k, kind, *(name for name, flag in flags.items() if flag)]))
    slices = min(n, slices_of_reader(w.nbytes() / BANDWIDTH))
    operations = 2 * batch * m * n * k
    kernel = make_kernel(
        "matvec.c", macros, label=label, operations=operations, slices=slices, headers=headers
    )
    if tiles is not None:
        inputs = inputs | {"w": tiles}
    return kernel((*lead, m, n), *inputs.values(), gradient=gradient)
