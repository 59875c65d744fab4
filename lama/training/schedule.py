"""How the learning rate changes over a run."""

import math


def cosine(step: int, steps: int, peak: float, floor: float, warmup: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to `floor` at the last of `steps`.

    Source: Loshchilov & Hutter 2017, section 3, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
