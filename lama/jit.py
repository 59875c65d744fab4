"""TinyJit without what it costs: the call that it does not capture, new tensors for every call's numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tinygrad import Tensor, TinyJit
from tinygrad.device import Buffer


def capture_at_once(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, captured by its first call and replayed by the others, which saves half of the start-up.

    TinyJit runs a function once without capturing it, for tensors that are not realised until then: here every tensor
    that `step` reads must be realised before. Its results are overwritten by the next call.
    """
    jit = TinyJit(step)
    jit.cnt = 1
    return jit


class Input:
    """One input of a captured step: a tensor that gets new numbers in place. To make a new one takes tinygrad milliseconds."""

    def __init__(self, device: str | None = None):
        self.device = device
        self._tensor: Tensor | None = None
        self._kind: tuple[Any, ...] = ()

    def __call__(self, array: np.ndarray) -> Tensor:
        """These numbers as a realised tensor, the same one as before where shape and dtype are the same."""
        array = np.ascontiguousarray(array)
        if self._tensor is None or self._kind != (array.shape, array.dtype):
            self._tensor, self._kind = Tensor(array, device=self.device).realize(), (array.shape, array.dtype)
            return self._tensor
        buffer, numbers = _buffer(self._tensor), array.data.cast("B")
        if buffer.device.startswith("CPU"):
            buffer.as_memoryview(force_zero_copy=True).cast("B")[:] = numbers
        else:
            buffer.copy_from(Buffer("PYTHON", buffer.size, buffer.dtype, opaque=numbers))
        return self._tensor


def number(x: Tensor) -> float:
    """The number in a realised float32 tensor that has one. `Tensor.item` takes half a millisecond."""
    return float(_buffer(x).as_memoryview(allow_zero_copy=True).cast("B").cast("f")[0])


def _buffer(x: Tensor) -> Buffer:
    buffer = x.uop.base.buffer
    assert isinstance(buffer, Buffer), "a tensor on several devices at once"
    return buffer
