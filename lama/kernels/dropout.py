"""Dropout whose mask is computed from a key, not sampled and saved: the gradient computes it again."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from lama.runtime.buffers import write
from lama.runtime.fusion import Producer, remember
from lama.runtime.kernel import (
    Gradient,
    Gradients,
    Macros,
    c_float,
    inputs_of,
    is_fast,
    make_kernel,
    of_kernel,
    slices_for,
)
from lama.runtime.strides import shape_of


@dataclass(frozen=True)
class Dropped(Producer):
    """Dropout of x."""

    x: UOp
    key: UOp
    rate: float
    site: int

    def inputs(self) -> list[Tensor]:
        """The tensors that `DROPPED` in vectors.h reads."""
        return [Tensor(self.key), site_tensor(self.site, str(self.key.device))]

    def macros(self) -> Macros:
        """The macros of `DROPPED` in vectors.h."""
        return {
            "DROPOUT": 1,
            "ROW": f"{math.prod(shape_of(Tensor(self.x))[1:])}u",
            "THRESHOLD": f"{threshold(self.rate)}u",
            "SCALE": c_float(1 / (1 - self.rate)),
        }


def dropout(x: Tensor, rate: float, key: Tensor, site: int) -> Tensor | None:
    """`ops.dropout` by a kernel, or None."""
    if not (x.dtype == dtypes.float32 and is_fast(x, key)):
        return None
    n, dropped = math.prod(shape_of(x)), Dropped(x.uop, key.uop, rate, site)
    kernel = make_kernel("dropout.c", {"N": n, **dropped.macros()}, slices=slices_for(n))
    y = kernel(shape_of(x), x, *dropped.inputs(), gradient=_gradient_for(rate, site))
    return remember(y, dropped)


@functools.cache
def site_tensor(site: int, device: str) -> Tensor:
    """A site's number as uint32 (1,). As a macro, it would make every site compile its own kernels."""
    return write(Tensor.empty(1, dtype=dtypes.uint32, device=device), np.array([site], np.uint32))


def threshold(rate: float) -> int:
    """The least hash of an element that is kept."""
    return int(rate * 2**32)


@functools.cache
def _gradient_for(rate: float, site: int) -> Gradient:
    """Dropout of the gradient, with the same mask."""

    def gradient(grad: UOp, call: UOp) -> Gradients:
        _, key, _ = inputs_of(call)
        return None, of_kernel(dropout(Tensor(grad), rate, key, site)).uop, None, None

    return gradient
