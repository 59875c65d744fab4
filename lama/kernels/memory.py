"""Memory of the CPU device: large pages for large buffers, and zeros.

tinygrad's buffers are in pages of 4 kB, and a core that reads weights spends a tenth of its time finding out where the next page is.
"""

import contextlib
import ctypes
import mmap
from dataclasses import replace
from typing import Any

import numpy as np
from tinygrad import Device, Tensor
from tinygrad.device import Buffer
from tinygrad.dtype import DType
from tinygrad.engine.realize import capturing
from tinygrad.uop.ops import Ops

_SAME_NUMBERS = (Ops.COPY, Ops.CONTIGUOUS, Ops.EXPAND, Ops.PERMUTE, Ops.RESHAPE)
LARGE = 1 << 22  # bytes from which on a buffer gets large pages, which are of 2 MiB on most machines


def use_large_pages(device: str) -> None:
    """Let this CPU device's large buffers lie in large pages from here on, where the system has them to give (Linux)."""
    if device.split(":")[0] != "CPU" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    allocator: Any = Device[device].allocator
    if isinstance(allocator._alloc, LargePages):
        return
    allocator._alloc = LargePages(allocator._alloc)


class LargePages:
    """An allocator's function `_alloc` that asks the system for memory itself."""

    def __init__(self, alloc: Any):
        self._alloc = alloc

    def __call__(self, size: int, options: Any) -> Any:
        if size < LARGE or options.external_ptr is not None:
            return self._alloc(size, options)
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory, tinygrad's, gets none
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = self._alloc(size, replace(options, external_ptr=ctypes.addressof(ctypes.c_char.from_buffer(memory))))
        buffer.meta = memory  # as long as the buffer is there
        return buffer


def host_numbers(x: Tensor) -> np.ndarray | None:
    """The numbers of x, in any order, where the host has them already; None for others, and while a step is captured.

    Nothing is computed or copied from another device.
    """
    made = x.uop
    while made.op in _SAME_NUMBERS:
        made = made.src[0]
    buffer = made.buffer if made.op is Ops.BUFFER and not capturing else None
    if not isinstance(buffer, Buffer) or not buffer.is_allocated() or buffer.device.split(":")[0] not in ("CPU", "NPY", "PYTHON"):
        return None
    return np.frombuffer(buffer.as_memoryview(allow_zero_copy=True), buffer.dtype.fmt)


def stored_zeros(*shape: int, dtype: DType, device: str | None) -> Tensor:
    """In memory. On the CPU without a kernel: to schedule and lower one takes a new process 0.2 s."""
    zeros = Tensor.empty(*shape, dtype=dtype, device=device)
    if not str(zeros.device).startswith("CPU"):
        return Tensor.zeros(*shape, dtype=dtype, device=device).contiguous().realize()
    buffer: Any = zeros.uop.buffer
    ctypes.memset(buffer.ensure_allocated().get_buf(zeros.device).va_addr, 0, buffer.nbytes)
    return zeros
