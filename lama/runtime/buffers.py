"""The memory of realised tensors: reading, writing and filling it without a kernel, and large pages."""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tinygrad import Device, Tensor, UOp, dtypes

from lama.runtime.internals import (
    Buffer,
    BufferSpec,
    DType,
    LRUAllocator,
    Memory,
    Ops,
    capturing,
    device_of,
    is_tested,
)
from lama.shapes import Array

HOST_DEVICES = ("CPU", "NPY", "PYTHON")
HUGE, SMALL, COLLAPSE = 14, 15, 25  # MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE of Linux
FRESH = 1 << 16  # bytes; zeros of this size or more come from the system instead of being written
LINE = 64  # bytes of a line of the processor's cache
SHARED = 1 << 26  # bytes of the memory that small tensors share
LARGE = 1 << 22  # bytes; a buffer of this size or more gets large pages, 2 MiB each on most machines


def use_large_pages(device: str) -> None:
    """Put this CPU device's large buffers in large pages from now on, if the system has them (Linux).

    tinygrad uses pages of 4 kB: a core that reads weights spends a tenth of its time looking them up.
    """
    if not is_tested() or device.split(":")[0] != "CPU" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    allocator = device_of(device).allocator
    if not isinstance(allocator._alloc, LargePages):
        allocator._alloc = LargePages(allocator._alloc)


class LargePages:
    """A replacement for an allocator's `_alloc` that asks the system for memory itself."""

    def __init__(self, alloc: "Callable[[int, BufferSpec], Memory]"):
        self._alloc = alloc
        self.packs = False
        """Whether buffers of less than LARGE bytes are placed side by side in the same pages."""
        self._shared, self._used = mmap.mmap(-1, 1), 1

    def __call__(self, size: int, options: "BufferSpec") -> Memory:
        if options.external_ptr is not None:
            return self._alloc(size, options)
        if self.packs and size < LARGE:
            if self._used + size > len(self._shared):
                self._shared, self._used = self._pages(SHARED), 0
            memory, first = self._shared, self._used
            self._used += -(-size // LINE) * LINE
        else:
            memory, first = self._pages(size), 0
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory, first))
        buffer = self._alloc(size, replace(options, external_ptr=address))
        buffer.meta = memory  # keeps the memory for as long as the buffer exists
        return buffer

    def _pages(self, size: int) -> mmap.mmap:
        # Unlike tinygrad's, not shared: that gets no large pages, and a forked process would write to it.
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= LARGE:
            _advise(memory, HUGE)
        return memory


@contextmanager
def packed(device: str | None = None) -> Iterator[None]:
    """Allocate small tensors of a CPU device side by side in the block, so that large pages hold them too.

    For tensors that are freed together, such as weights: their memory is freed with the last of them. In
    separate pages of 4 kB, the matrices of SmolLM2 take 6 to 12 % longer to read.
    """
    alloc = getattr(device_of(Device.canonicalize(device)).allocator, "_alloc", None)
    if not isinstance(alloc, LargePages):
        yield
        return
    alloc.packs = True
    try:
        yield
    finally:
        alloc.packs = False


def empty(*shape: int, dtype: DType = dtypes.float32, device: str | None = None) -> Tensor:
    """An unfilled tensor. `Tensor.empty` takes three times as long, since it also rewrites the shape."""
    if not is_tested():
        return Tensor.empty(*shape, dtype=dtype, device=device)
    return Tensor(UOp.new_buffer(Device.canonicalize(device), math.prod(shape), dtype).reshape(shape))


def zeros(*shape: int, dtype: DType, device: str | None) -> Tensor:
    """A realised tensor of zeros. On the CPU no kernel fills it: that would cost a new process 0.2 s.

    Large tensors get zeroed memory from the system. It takes up room only where it is written, in small pages
    until `use_large_pages_for`.
    """
    tensor = empty(*shape, dtype=dtype, device=device)
    if not is_on_host(tensor):
        return Tensor.zeros(*shape, dtype=dtype, device=device).contiguous().realize()
    if tensor.nbytes() >= FRESH:
        release_unused(device)
    if (memory := _own_memory(tensor)) is None:
        ctypes.memset(address_of(buffer_of(tensor)), 0, tensor.nbytes())
    else:
        _advise(memory, SMALL)
    return tensor


def use_large_pages_for(*tensors: Tensor) -> None:
    """Move the memory of large `zeros` into large pages, if the system can do that (Linux 6.1)."""
    large = [tensor for tensor in tensors if tensor.nbytes() >= LARGE]
    for memory in filter(None, map(_own_memory, large)):
        _advise(memory, HUGE)
        _advise(memory, COLLAPSE)


def _own_memory(tensor: Tensor) -> mmap.mmap | None:
    """The memory of a tensor of at least FRESH bytes, if it came from the system."""
    if not is_on_host(tensor) or tensor.nbytes() < FRESH:
        return None
    buffer = buffer_of(tensor)
    memory = buffer.get_buf(buffer.device).meta
    return memory if isinstance(memory, mmap.mmap) else None


def _advise(memory: mmap.mmap, advice: int) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without it
            memory.madvise(advice)


def from_array(array: Array, dtype: DType, device: str | None) -> Tensor:
    """A realised tensor with the numbers of `array`, in which bfloat16 numbers are uint16 bits.

    The bytes are copied into the tensor's buffer: `Tensor(array).realize()` takes 5 ms a tensor.
    """
    return write(empty(*array.shape, dtype=dtype, device=device), array)


def write(tensor: Tensor, array: Array) -> Tensor:
    """Overwrite a realised tensor with the numbers of an array of as many bytes; returns the tensor."""
    memory = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if not is_tested():
        there = Tensor(memory, device=tensor.device).bitcast(tensor.dtype).reshape(tensor.shape)
        tensor.assign(there).realize()
    elif (here := host_array(tensor)) is not None:
        here.reshape(-1).view(np.uint8)[:] = memory
    else:
        buffer = buffer_of(tensor)
        buffer.copy_from(Buffer("PYTHON", buffer.size, buffer.dtype, opaque=memory.data))
    return tensor


def read(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a realised tensor, one axis. They may be its own memory: use them before it changes."""
    if not is_tested():
        return tensor.flatten().bitcast(dtypes.uint8).numpy()
    return np.frombuffer(buffer_of(tensor).as_memoryview(allow_zero_copy=True), np.uint8)


def read_scalar(tensor: Tensor) -> float:
    """The number in a realised float32 tensor of one element. `Tensor.item` takes half a millisecond."""
    if not is_tested():
        return float(tensor.item())
    return float(buffer_of(tensor).as_memoryview(allow_zero_copy=True).cast("B").cast("f")[0])


def is_on_host(tensor: Tensor) -> bool:
    """Whether a realised tensor is in the host's memory."""
    return is_tested() and str(tensor.device).startswith("CPU")


def host_array(tensor: Tensor) -> Array | None:
    """A realised tensor's memory, which may be written; bfloat16 as uint16. None if it is not the host's."""
    if not is_on_host(tensor):
        return None
    kind = np.uint16 if tensor.dtype == dtypes.bfloat16 else np.dtype(tensor.dtype.fmt)
    memory = buffer_of(tensor).as_memoryview(force_zero_copy=True)
    return np.frombuffer(memory, kind).reshape(tensor.shape)


def host_numbers(tensor: Tensor) -> Array | None:
    """The numbers of a tensor, in any order, if the host has them already and no step is being captured.

    Otherwise None. Nothing is computed or copied from another device.
    """
    if not is_tested() or capturing:
        return None
    source = tensor.uop
    while source.op in (Ops.COPY, Ops.CONTIGUOUS, Ops.EXPAND, Ops.PERMUTE, Ops.RESHAPE):
        source = source.src[0]
    buffer = source.buffer if source.op is Ops.BUFFER else None
    if not isinstance(buffer, Buffer) or not buffer.is_allocated():
        return None
    if buffer.device.split(":")[0] not in HOST_DEVICES:
        return None
    return np.frombuffer(buffer.as_memoryview(allow_zero_copy=True), buffer.dtype.fmt)


def buffer_of(tensor: Tensor) -> "Buffer":
    """The allocated buffer of a realised tensor on one device."""
    buffer = tensor.uop.base.buffer
    assert isinstance(buffer, Buffer), "a tensor on several devices at once"
    return buffer.ensure_allocated()


def address_of(buffer: "Buffer") -> int:
    """A buffer's address in this process's memory."""
    return int(buffer.ensure_allocated().get_buf(buffer.device).va_addr)


def release_unused(device: str | None) -> None:
    """Return the memory of freed tensors to the system; tinygrad keeps it for tensors of the same size."""
    if is_tested() and isinstance(allocator := Device[device or Device.DEFAULT].allocator, LRUAllocator):
        allocator.free_cache()
