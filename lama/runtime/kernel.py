"""C source as tinygrad kernels, of which every fast path on the CPU is one.

A kernel is a C function of buffers. Macros fix all its sizes, so that the compiler knows the length of every
loop. `is_fast` decides where kernels are used; elsewhere their plain twins in `lama.ops` run.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Protocol, runtime_checkable

from tinygrad import Device, Tensor, UOp, dtypes

from lama.runtime.buffers import empty
from lama.runtime.internals import AddrSpace, Estimates, KernelInfo, Ops, ProgramInfo, is_tested
from lama.runtime.strides import materialise
from lama.runtime.threads import load_c, use_all_cores

SLICE = 20_000  # nanoseconds: the least time of a slice
MOST_SLICES = 64
C_TYPES = {dtypes.float32: "float", dtypes.float16: "_Float16", dtypes.bfloat16: "unsigned short"}
"""The types of the numbers that kernels read; they compute in float32."""
Macros = dict[str, str | int]
_compiling = threading.Lock()
Gradients = tuple[UOp | None, ...]
Gradient = Callable[[UOp, UOp], Gradients]


@runtime_checkable
class GradientOfTwo(Protocol):
    """The gradient of a kernel with two results. tinygrad names `call` where both have a gradient."""

    def __call__(self, *grads: UOp, call: UOp | None = None) -> Gradients: ...


@dataclass(frozen=True)
class Kernel:
    """One C function, called NAME in `file`, compiled with the macros (name, value) defined before it."""

    name: str
    file: str
    macros: tuple[tuple[str, str | int], ...]
    operations: int = 0
    """Floating-point operations, for tinygrad's statistics."""
    slices: int = 1
    """Parts that may run at the same time; the C function gets the part's number as its last argument."""
    in_place: bool = False
    """Whether it reads what it writes."""
    headers: tuple[str, ...] = ()
    """Files that come before `file`, after vectors.h, which is always there."""

    def source(self) -> str:
        """The whole C file."""
        folder = resources.files("lama.kernels")
        macros = {"NAME": self.name, "SLICES": self.slices, **dict(self.macros)}
        lines = [f"#define {key} {value}\n" for key, value in macros.items()]
        files = ("vectors.h", *self.headers, self.file)
        return "".join(lines + [folder.joinpath(file).read_text("utf-8") for file in files])

    def __call__(self, shape: tuple[int, ...], *inputs: Tensor, gradient: Gradient | None = None) -> Tensor:
        """Run on `inputs`, materialised first; the result is float32 of `shape`.

        `gradient` gets the result's gradient and the call, and returns None for the result and a gradient or
        None for each input: see `inputs_of`. It must be one object for equal kernels.
        """
        out = empty(*shape, device=str(inputs[0].device))
        return self.into([out], *inputs, gradient=gradient)[0]

    def into(
        self, outputs: Sequence[Tensor], *inputs: Tensor, gradient: Gradient | GradientOfTwo | None = None
    ) -> list[Tensor]:
        """Run on `inputs`, materialised first, and write the realised `outputs`; returns these, written."""
        program = functools.partial(_program, self, str(inputs[0].device), len(outputs))
        buffers = [*outputs, *map(materialise, inputs)]
        return Tensor.custom_kernel(*buffers, fxn=program, grad_fxn=gradient)[: len(outputs)]


def make_kernel(
    file: str,
    macros: Mapping[str, str | int],
    *,
    label: str | None = None,
    operations: int = 0,
    slices: int = 1,
    in_place: bool = False,
    headers: tuple[str, ...] = (),
) -> Kernel:
    """The kernel of `file` with these macros, named after the file and `label`.

    By default the label is the macros: numbers above 1 and texts by their value, 1 by its name.
    """
    macros = {key: int(value) if isinstance(value, bool) else value for key, value in macros.items()}
    if label is None:
        label = "_".join(key.lower() if value == 1 else str(value) for key, value in macros.items() if value)
    name = f"lama_{file.removesuffix('.c')}_{label}".replace("-", "m")
    name = "".join(c if c.isalnum() else "_" for c in name)
    return Kernel(name, file, tuple(macros.items()), operations, slices, in_place, headers)


def c_float(value: float) -> str:
    """A float32 constant in C."""
    return f"(float){float(value)!r}"


def slices_for(nanoseconds: float) -> int:
    """The number of slices for a kernel that takes one core about `nanoseconds`, each worth sharing out.

    It does not depend on the number of threads: with more slices than threads, a late thread delays no other.
    """
    return max(1, min(MOST_SLICES, int(nanoseconds / SLICE)))


def inputs_of(call: UOp, outputs: int = 1) -> list[Tensor]:
    """A kernel call's inputs, for its gradient."""
    return [Tensor(source) for source in call.src[1 + outputs :]]


def result_of(call: UOp, i: int = 0) -> Tensor:
    """A kernel call's result i, for its gradient, which does not compute it again."""
    return Tensor(call.src[1 + i].after(call))


def is_fast(*tensors: Tensor) -> bool:
    """Whether the C kernels support these tensors: static shapes, one CPU device, Clang renderer.

    Never with LAMA_REFERENCE=1 in the environment.
    """
    device = tensors[0].device
    return (
        isinstance(device, str)
        and device.split(":")[0] == "CPU"
        and all(t.device == device and all(isinstance(n, int) and n > 0 for n in t.shape) for t in tensors)
        and is_tested()
        and not _reference()
        and _compiles_c(device)
    )


def are_fast_floats(*tensors: Tensor) -> bool:
    """`is_fast`, and all are float32."""
    return all(t.dtype == dtypes.float32 for t in tensors) and is_fast(*tensors)


def native(file: str, **macros: str | int) -> Callable[..., None] | None:
    """The C function of a file in lama/kernels, called directly with addresses and integers.

    Other Python threads run meanwhile. None if `is_fast` would be False for tensors on the default device.
    """
    if Device.DEFAULT != "CPU" or not is_tested() or _reference() or not _compiles_c("CPU"):
        return None
    with _compiling:
        return _native(file, tuple(macros.items()))


@functools.cache
def _native(file: str, macros: tuple[tuple[str, str | int], ...]) -> Callable[..., None]:
    name = f"lama_{file.removesuffix('.c')}"
    text = resources.files("lama.kernels").joinpath(file).read_text("utf-8")
    lines = [f"#define {key} {value}\n" for key, value in (("NAME", name), *macros)]
    program = load_c("".join([*lines, text]), name)

    def function(*arguments: int) -> None:
        program.fxn(*map(ctypes.c_int64, arguments))

    return function


def of_kernel(result: Tensor | None) -> Tensor:
    """A kernel's result in a gradient. It is not None: kernels support all tensors that kernels made."""
    assert result is not None, "a tensor that no kernel made"
    return result


@functools.cache
def _reference() -> bool:
    return os.environ.get("LAMA_REFERENCE", "") not in ("", "0")


@functools.cache
def _compiles_c(device: str) -> bool:
    """Whether the device compiles C, unlike LLVM and other renderers. If so, it gets its threads here."""
    if type(Device[device].renderer).__name__ != "ClangRenderer":
        return False
    use_all_cores(device)
    return True


def finds_instruction(device: str, header: str, macro: str) -> bool:
    """Whether `header` defines `macro` on this CPU device: only if the processor has the instruction."""
    compiler = Device[device].compiler
    if compiler is None:
        return False
    mark = f"lama: {macro} of {header}"
    source = Kernel("probe", header, ()).source()
    source += f'\n#ifdef {macro}\nconst char probe[] = "{mark}";\n#endif\n'
    return mark.encode() in compiler.compile_cached(source)


@functools.cache
def _program(kernel: Kernel, device: str, outputs: int, *buffers: UOp) -> UOp:
    """The program that tinygrad compiles and caches when the kernel first runs."""
    places = tuple(range(len(buffers)))
    info = KernelInfo(kernel.name, estimates=Estimates(ops=kernel.operations))
    sink = UOp.sink(*(b.base for b in buffers), arg=info)
    number = UOp.param(
        len(buffers), dtypes.int32, (), vmin_vmax=(0, kernel.slices), name="core_id", addrspace=AddrSpace.ALU
    )
    program = ProgramInfo(
        kernel.name,
        (kernel.slices, 1, 1),
        (1, 1, 1),
        (number,),
        globals=places,
        outs=places[:outputs],
        ins=places if kernel.in_place else places[outputs:],
        target=Device[device].renderer.target,
    )
    source = UOp(Ops.SOURCE, arg=kernel.source())
    return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.LINEAR, src=(*sink.src, sink)), source), arg=program)
