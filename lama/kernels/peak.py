"""The peak speed of this machine's cores, with which kernels are compared."""

import time

from tinygrad import Tensor

from lama.host import may_use_amx
from lama.kernels.integers import multiplies_integers
from lama.kernels.matmul import multiplies_bfloat16
from lama.runtime.capture import CapturedStep
from lama.runtime.kernel import is_fast, make_kernel
from lama.runtime.threads import pool, threads

REPEATS = 400_000


def peak_flops(device: str, bits: int = 32) -> float | None:
    """float32 operations a second of all threads at once, the best of five measurements (20 ms each).

    All threads run at once, since two virtual cores may share a real one. With 8 or 16 `bits`, the operations
    are those of bytes or bfloat16 if the processor has an instruction for them. None if C kernels do not run:
    every other device would need its own measurement.
    """
    x = Tensor.full((32,), 1e-3, device=device).contiguous().realize()
    if not is_fast(x):
        return None
    macros = {"REPEATS": REPEATS, "INTEGERS": bits == 8 and multiplies_integers(device)}
    macros["BFLOAT16"] = bits == 16 and multiplies_bfloat16(device)
    macros["AMX"] = (macros["INTEGERS"] or macros["BFLOAT16"]) and may_use_amx()
    slices = threads()
    headers = ("amx.h", "integers.h", "bfloat16.h")
    kernel = make_kernel("peak.c", macros, slices=slices, headers=headers)
    run = CapturedStep(lambda x: kernel((slices, 32), x).realize())
    operations = REPEATS * float(run(x).numpy()[:, 16].sum())
    best = float("inf")
    for _ in range(5):
        pool().share_again()
        began = time.perf_counter()
        run(x)
        best = min(best, time.perf_counter() - began)
    return operations / best
