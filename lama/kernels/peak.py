"""How fast this machine's cores can multiply and add: what a kernel's speed is measured against."""

import time

from tinygrad import Tensor

from lama.compiler import cores
from lama.jit import capture_at_once
from lama.kernels.integers import multiplies_integers
from lama.kernels.program import Kernel, is_fast

REPEATS = 400_000


def peak_flops(device: str, bits: int = 32) -> float | None:
    """float32 operations a second of all cores together, from the best of a few measurements on one (20 ms).

    With 8 `bits`, those of bytes, where there is an instruction that multiplies them. None where C kernels do not run: other
    devices would each need their own way to be asked.
    """
    x = Tensor.full((32,), 1e-3, device=device).contiguous().realize()
    if not is_fast(x):
        return None
    bytes_too = bits == 8 and multiplies_integers(device)
    macros = (("REPEATS", REPEATS), ("INTEGERS", int(bytes_too)))
    kernel = Kernel(f"lama_peak_{bytes_too:d}", "peak.c", macros, headers=("integers.h",))
    run = capture_at_once(lambda x: kernel((32,), x).realize())
    operations = REPEATS * float(run(x).numpy()[16])
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        run(x)
        best = min(best, time.perf_counter() - began)
    return operations / best * cores()
