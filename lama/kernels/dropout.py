"""Dropout whose mask is computed from a key, not drawn and stored: the gradient computes it again."""

import functools
import math
import sys
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes
from tinygrad.device import Buffer

from lama.kernels.fusion import Record, made
from lama.kernels.program import Gradient, Kernel, inputs_of, is_fast, slices_for
from lama.kernels.views import shape_of

GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: consecutive sites start far apart


def dropout(x: Tensor, rate: float, key: Tensor, site: int) -> Tensor:
    """x / (1 − rate) with each element zero instead with probability `rate`, in float32, any shape of up to 2³² elements.

    Which ones depends on `key`, uint32 of shape (2,), and on `site`, an int below 2³²: the same two drop the same
    elements again; a new key[0] for each step and a site for each place in the model drop others. key[1] says which row
    of a larger batch the first of x is, so that parts of a batch drop what the whole would. Element i of the flattened
    batch is kept where mix(mix(i ^ seed) + seed) >= rate · 2³², with seed = mix(key[0] + site · 2³²/φ), in 32 bits.
    Source: Srivastava et al. 2014, scaled in training; mix is Wellons's lowbias32, https://nullprogram.com/blog/2018/07/31/.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1; got rate={rate}")
    if rate == 0:
        return x.float()
    if not (x.dtype == dtypes.float32 and is_fast(x, key)):
        return kept(shape_of(x), rate, key, site).where(x.float() * (1 / (1 - rate)), 0)
    y = _kernel(x, rate)(shape_of(x), x, key, site_tensor(site, str(x.device)), gradient=_gradient_for(rate, site))
    return made(y, Dropped(x.uop, key.uop, rate, site))


@dataclass(frozen=True)
class Dropped(Record):
    """`dropout` of x."""

    x: UOp
    key: UOp
    rate: float
    site: int


def dropout_macros(shape: tuple[int, ...], rate: float) -> tuple[tuple[str, str | int], ...]:
    """What `drop` in vectors.h wants of a kernel that drops elements of a tensor of this shape."""
    return ("ROW", f"{math.prod(shape[1:])}u"), ("THRESHOLD", f"{threshold(rate)}u"), ("SCALE", f"(float){1 / (1 - rate)!r}")


@functools.cache
def site_tensor(site: int, device: str) -> Tensor:
    """The number of a site, uint32 (1,), for kernels: as a macro it would have each of them compiled once for each site."""
    tensor = Tensor.empty(1, dtype=dtypes.uint32, device=device)
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "a tensor on several devices at once"
    buffer.ensure_allocated().as_memoryview(force_zero_copy=True).cast("B")[:] = site.to_bytes(4, sys.byteorder)
    return tensor


def kept(shape: tuple[int, ...], rate: float, key: Tensor, site: int) -> Tensor:
    """The mask of `dropout`, True where an element is kept, in plain tinygrad."""
    seed = _mix(key[0:1] + site * GOLDEN % 2**32)
    i = key[1:2] * math.prod(shape[1:]) + Tensor.arange(math.prod(shape), dtype=dtypes.uint32)
    return (_mix(_mix(i ^ seed) + seed) >= threshold(rate)).reshape(shape)


def _mix(x: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of x: lowbias32, a bijection of the 32-bit numbers."""
    x = (x ^ x >> 16) * 0x7FEB352D
    x = (x ^ x >> 15) * 0x846CA68B
    return x ^ x >> 16


def threshold(rate: float) -> int:
    """The least hash of an element that is kept."""
    return int(rate * 2**32)


def _kernel(x: Tensor, rate: float) -> Kernel:
    shape = shape_of(x)
    n = math.prod(shape)
    name = f"lama_dropout_{n}_{math.prod(shape[1:])}_{threshold(rate)}"
    return Kernel(name, "dropout.c", (("N", n), *dropout_macros(shape, rate)), slices=slices_for(1.0 * n))


@functools.cache
def _gradient_for(rate: float, site: int) -> Gradient:
    """dx = dy where x was kept, scaled alike: dropout of the gradient."""

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        _, key, _ = inputs_of(call)
        return None, dropout(Tensor(grad), rate, key, site).uop, None, None

    return gradient
