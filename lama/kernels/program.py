"""C source as a tinygrad kernel: what every fast path on the CPU is made with.

A kernel is a C function of buffers, fixed in all its sizes by macros, so that the compiler knows every loop's length.
It is used where the tensors' device is tinygrad's CPU with a C compiler, all sizes are plain numbers, and
LAMA_REFERENCE=1 is not in the environment; everywhere else its plain tinygrad twin runs.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

from lama.kernels.pool import use_all_cores
from lama.kernels.views import stored

SLICE = 20_000  # nanoseconds, the least that a slice may take
MOST_SLICES = 64
STORED_TYPES = {dtypes.float32: "float", dtypes.float16: "_Float16", dtypes.bfloat16: "unsigned short"}
"""In C, of numbers that kernels read; they compute in float32."""
Gradient = Callable[[UOp, UOp], tuple[UOp | None, ...]]


@dataclass(frozen=True)
class Kernel:
    """One C function: `file` in this folder, and the macros (name, value) that go before it; the function is NAME."""

    name: str
    file: str
    macros: tuple[tuple[str, str | int], ...]
    operations: int = 0
    """Floating-point operations, for tinygrad's statistics."""
    slices: int = 1
    """Parts that may run at the same time: the C function's last argument is the part's number, SLICES how many there are."""

    in_place: bool = False
    """Whether it reads what it writes."""

    headers: tuple[str, ...] = ()
    """Files that come before it, after vectors.h, which all have."""

    def source(self) -> str:
        folder = resources.files("lama.kernels")
        macros = "".join(f"#define {key} {value}\n" for key, value in (("NAME", self.name), ("SLICES", self.slices), *self.macros))
        return macros + "".join(folder.joinpath(file).read_text("utf-8") for file in ("vectors.h", *self.headers, self.file))

    def __call__(self, shape: tuple[int, ...], *inputs: Tensor, gradient: Gradient | None = None) -> Tensor:
        """Run on `inputs`, stored first; the result is float32 of `shape`.

        `gradient` gets the result's gradient and the call (whose sources after the first two are the inputs), and
        returns None for the result and a gradient or None for each input. It must be one object for equal kernels.
        """
        out = Tensor.empty(*shape, dtype=dtypes.float32, device=inputs[0].device)
        return self.into([out], *inputs, gradient=gradient)[0]

    def into(self, outputs: Sequence[Tensor], *inputs: Tensor, gradient: Gradient | None = None) -> list[Tensor]:
        """Run on `inputs`, stored first, and write `outputs`, stored tensors; returns them, written."""
        program = functools.partial(_program, self, str(inputs[0].device), len(outputs))
        return Tensor.custom_kernel(*outputs, *(stored(x) for x in inputs), fxn=program, grad_fxn=gradient)[: len(outputs)]


def slices_for(nanoseconds: float) -> int:
    """How many slices for a kernel that takes one core about so long: none so short that handing it out costs as much.

    Not the number of threads: with more slices than threads, one that is late or busy elsewhere holds nobody up.
    """
    return max(1, min(MOST_SLICES, int(nanoseconds / SLICE)))


def inputs_of(call: UOp) -> list[Tensor]:
    """A kernel call's inputs, for its gradient."""
    return [Tensor(source) for source in call.src[2:]]


def result_of(call: UOp) -> Tensor:
    """A kernel call's result, for its gradient: not computed again."""
    return Tensor(call.src[1].after(call))


def is_fast(*tensors: Tensor) -> bool:
    """Whether C kernels serve these tensors: plain sizes, all on one CPU device that compiles C."""
    device = tensors[0].device
    return (
        isinstance(device, str)
        and device.split(":")[0] == "CPU"
        and all(t.device == device and all(isinstance(n, int) and n > 0 for n in t.shape) for t in tensors)
        and not _reference()
        and _compiles_c(device)
    )


@functools.cache
def _reference() -> bool:
    return os.environ.get("LAMA_REFERENCE", "") not in ("", "0")


@functools.cache
def _compiles_c(device: str) -> bool:
    """LLVM and other renderers do not compile C. Those that do get their threads here."""
    if type(Device[device].renderer).__name__ != "ClangRenderer":
        return False
    use_all_cores(device)
    return True


@functools.cache
def _program(kernel: Kernel, device: str, outputs: int, *buffers: UOp) -> UOp:
    """tinygrad compiles the source, and remembers what came of it, once the kernel is to run."""
    places = tuple(range(len(buffers)))
    sink = UOp.sink(*(b.base for b in buffers), arg=KernelInfo(kernel.name, estimates=Estimates(ops=kernel.operations)))
    target = Device[device].renderer.target
    slice_number = UOp.param(len(buffers), dtypes.int32, (), vmin_vmax=(0, kernel.slices), name="core_id", addrspace=AddrSpace.ALU)
    size, read = (kernel.slices, 1, 1), places if kernel.in_place else places[outputs:]
    info = ProgramInfo(kernel.name, size, (1, 1, 1), (slice_number,), globals=places, outs=places[:outputs], ins=read, target=target)
    return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.LINEAR, src=(*sink.src, sink)), UOp(Ops.SOURCE, arg=kernel.source())), arg=info)
