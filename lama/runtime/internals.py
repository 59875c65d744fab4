"""Every internal name of tinygrad that lama uses, imported in one place if the release was tested.

On another release `is_tested()` is False and each name but DType is None: none of them may be used.
tests/test_tinygrad_contract.py states what lama expects of each name.
"""

# ruff: noqa: F401

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tinygrad.dtype import DType

from lama.runtime.release import is_tested

if TYPE_CHECKING or is_tested():
    from tinygrad.device import Buffer, BufferSpec, Compiled, LRUAllocator, MultiBuffer, TinyELF
    from tinygrad.dtype import AddrSpace
    from tinygrad.engine.jit import GraphRunner
    from tinygrad.engine.realize import capturing, get_call_arg_uops, get_graph_runtime, resolve_params
    from tinygrad.helpers import (
        DEBUG,
        NUM_CPU_THREADS,
        PROFILE,
        ContextVar,
        diskcache_get,
        diskcache_put,
        getenv,
    )
    from tinygrad.renderer import Estimates
    from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo
else:
    GraphRunner = object  # a base class

    def __getattr__(name: str) -> None:
        """The other names."""


@runtime_checkable
class Memory(Protocol):
    """A buffer's memory on the CPU device."""

    va_addr: int
    meta: object


@runtime_checkable
class Program(Protocol):
    """A compiled and loaded program of the CPU device."""

    addr: int
    runtimevars: dict[str, int]

    def fxn(self, *arguments: object) -> None:
        """The C function itself."""


@runtime_checkable
class CallableProgram(Program, Protocol):
    """A program that tinygrad calls."""

    def __call__(self, *buffers: Memory, **how: object) -> float | None: ...


def device_of(name: str) -> Any:
    """tinygrad's open device, some of whose attributes lama replaces."""
    from tinygrad import Device

    return Device[name]


def load_program(elf: "TinyELF") -> Program:
    """Load a compiled program on the CPU device. Imported late: tinygrad's module opens the device."""
    from tinygrad.runtime.ops_cpu import CPUProgram

    program: Program = CPUProgram(device_of("CPU"), elf)
    return program
