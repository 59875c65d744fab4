"""How fast this machine can multiply and add on the threads that kernels run on: what their speed is measured against."""

import time

from tinygrad import Tensor

from lama.jit import capture_at_once
from lama.kernels.integers import multiplies_integers
from lama.kernels.pool import pool, threads
from lama.kernels.program import Kernel, is_fast

REPEATS = 400_000


def peak_flops(device: str, bits: int = 32) -> float | None:
    """float32 operations a second of all threads at once, from the best of a few measurements (20 ms each).

    At once, since two virtual cores may turn out to be one. With 8 `bits`, those of bytes, where there is an instruction that
    multiplies them. None where C kernels do not run: other devices would each need their own way to be asked.
    """
    x = Tensor.full((32,), 1e-3, device=device).contiguous().realize()
    if not is_fast(x):
        return None
    bytes_too = bits == 8 and multiplies_integers(device)
    macros = (("REPEATS", REPEATS), ("INTEGERS", int(bytes_too)))
    slices = threads()
    kernel = Kernel(f"lama_peak_{bytes_too:d}", "peak.c", macros, slices=slices, headers=("integers.h",))
    run = capture_at_once(lambda x: kernel((slices, 32), x).realize())
    operations = REPEATS * float(run(x).numpy()[:, 16].sum())
    best = float("inf")
    for _ in range(5):
        pool().together()
        began = time.perf_counter()
        run(x)
        best = min(best, time.perf_counter() - began)
    return operations / best
