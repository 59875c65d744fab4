"""All cores for tinygrad's CPU device, which has one: a pool of threads, and the replay of a captured step in one call.

tinygrad runs a kernel's slices (`core_id`) one after the other, and calls every kernel from Python. Here a program with
slices shares them out among LAMA_THREADS threads (default: the cores that this process may use), and what TinyJit has
captured is a list of calls that pool.c runs. Which thread takes a slice changes no result: slices write different places.
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from tinygrad import Device, UOp
from tinygrad.device import TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.engine.realize import get_call_arg_uops
from tinygrad.helpers import NUM_CPU_THREADS, getenv
from tinygrad.uop.ops import Ops

from lama.compiler import asked_threads, cores

SPIN = 100e-6  # seconds that a thread waits for the next kernel before it sleeps
CHUNK = 32  # calls between two looks at the signals: Ctrl-C is not to wait for a whole step
NO_PLACE = 64  # of the slice's number, in a kernel that takes none
FUNCTIONS = ("pthread_mutex_lock", "pthread_mutex_unlock", "pthread_cond_wait", "pthread_cond_signal", "sched_yield", "clock_gettime")


def threads() -> int:
    """How many threads kernels run on. Raises UsageError."""
    return asked_threads() or max(1, min(cores(), NUM_CPU_THREADS.value))  # tinygrad's number knows a container's limit


def on_threads(work: Callable[[Any], Any], items: Iterable[Any], most: int = 64) -> None:
    """Do `work` for each item, on at most `most` threads, or on the caller's where the system has no more."""
    items = list(items)
    with ThreadPoolExecutor(min(most, threads())) as executor:
        try:
            list(executor.map(work, items))
        except RuntimeError:  # can't start new thread
            list(map(work, items))


def use_all_cores(device: str) -> None:
    """Let this CPU device's programs, and its captured steps, run as this module says."""
    cpu: Any = Device[device]
    if cpu.graph is None and sys.platform != "win32" and not getenv("HCQ2"):  # these two have calls of their own
        cpu.runtime_t, cpu.graph = functools.partial(PooledProgram, cpu.runtime_t), Replay


class Pool:
    """Native threads that sleep until there are slices to run; the caller is one of the `count`."""

    def __init__(self, count: int):
        self._memory = ctypes.create_string_buffer(16384)
        words = (ctypes.c_uint64 * 2048).from_buffer(self._memory)
        self._at = (ctypes.addressof(words) + 63) // 64 * 64
        self._run, worker = _program("lama_run", 0), _program("lama_worker", 1)
        state = (ctypes.c_uint64 * 11).from_address(self._at)
        self._alone = (ctypes.c_uint64 * 2).from_address(self._at + 8 * len(state))
        mutex, condition = self._at + 8192, self._at + 8704
        with contextlib.suppress(AttributeError, OSError, RuntimeError):  # no such functions, or no more threads: do with fewer
            library = ctypes.CDLL(None)
            addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in FUNCTIONS]
            library.pthread_mutex_init(ctypes.c_void_p(mutex), None)
            library.pthread_cond_init(ctypes.c_void_p(condition), None)
            state[:] = [*addresses, mutex, condition, time.CLOCK_MONOTONIC, int(SPIN * 1e9), count]
            for _ in range(count - 1):
                threading.Thread(target=self._wait_for_work, args=(worker,), daemon=True).start()

    def _wait_for_work(self, worker: Any) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the threads that run Python
        worker.fxn(ctypes.c_uint64(self._at))

    def together(self) -> None:
        """Forget that a thread was late: the next call is shared out among all."""
        self._alone[:] = [0, 0]

    def run(self, calls: int, count: int) -> None:
        """Run `count` calls, written one after the other from address `calls` on."""
        self._run.fxn(ctypes.c_uint64(self._at), ctypes.c_uint64(calls), ctypes.c_uint64(count))


@functools.cache
def pool() -> Pool:
    """The process's own."""
    return Pool(threads())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads stay in the parent


def _program(name: str, worker: int) -> Any:
    """A function of pool.c, compiled and loaded as kernels are. A kernel's file holds one function."""
    from tinygrad.runtime.ops_cpu import CPUProgram  # opens the device

    device: Any = Device["CPU"]
    source = f"#define WORKER {worker}\n" + resources.files("lama.kernels").joinpath("pool.c").read_text("utf-8")
    return CPUProgram(device, TinyELF(device.compiler.compile_cached(source), name, device.renderer.target, ()))


def call_words(program: Any, slices: int, arguments: list[int]) -> list[int]:
    """What pool.c wants to know of a call, as numbers; the arguments start at the fifth."""
    words = next(n for n in (8, 16, 64) if len(arguments) <= n)
    place = program.runtimevars.get("core_id", NO_PLACE)
    return [program.addr, slices, place, words, *arguments, *[0] * (words - len(arguments))]


class PooledProgram:
    """A program of the CPU device whose slices run on all threads."""

    def __init__(self, program_class: Callable[[Any, TinyELF], Any], device: Any, elf: TinyELF):
        self.program = program_class(device, elf)

    def __call__(self, *buffers: Any, global_size: tuple[int, int, int] = (1, 1, 1), vals: tuple[int | None, ...] = (), **how: Any) -> Any:
        if global_size[0] == 1:
            return self.program(*buffers, global_size=global_size, vals=vals, **how)
        began = time.perf_counter()
        numbers = call_words(self.program, global_size[0], [*(b.va_addr for b in buffers), *(v or 0 for v in vals)])
        calls = (ctypes.c_uint64 * len(numbers))(*numbers)
        pool().run(ctypes.addressof(calls), 1)
        return time.perf_counter() - began if how.get("wait") else None


class Replay(GraphRunner):
    """A captured step's kernels as one list of calls; only what changed since the last time is written anew."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        numbers: list[int] = []
        self._starts: list[int] = []
        for (_, program, buffers, device_vars), runtime in zip(self.calls, self.runtimes, strict=True):
            program_here = runtime.program if isinstance(runtime, PooledProgram) else runtime  # made before `use_all_cores`
            values = [device_vars.get(v.expr, 0) for v in program.arg.vars]
            self._starts.append(len(numbers))
            numbers += call_words(program_here, int(program.arg.global_size[0]), [*(b.get_buf(b.device).va_addr for b in buffers), *values])
        self._words = (ctypes.c_uint64 * len(numbers))(*numbers)
        self.placed = 0

    def __call__(self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False) -> float | None:
        began = time.perf_counter()
        self.placed += 1
        for start, replace in zip(self._starts, self.uop_replace, strict=True):
            for place, i in replace:
                buffer: Any = input_uops[i].buffer
                self._words[start + 4 + place] = buffer.get_buf(buffer.device).va_addr
        for j, i, value in self.updated_vars(var_vals):
            self._words[self._starts[j] + 4 + len(self.calls[j][2]) + i] = value
        self.again()
        return time.perf_counter() - began if wait else None

    def again(self) -> None:
        """The calls as the last one left them."""
        run, at, n = pool().run, ctypes.addressof(self._words), len(self._starts)
        for first in range(0, n, CHUNK):
            run(at + 8 * self._starts[first], min(CHUNK, n - first))

    @staticmethod
    def supports_uop(batch_devs: list[Any], new_call: UOp) -> bool:
        arguments = get_call_arg_uops(new_call)
        # An input is replaced where it stands for itself; a part of one is not.
        whole = all(a.op is Ops.PARAM or not any(u.op is Ops.PARAM for u in a.toposort()) for a in arguments)
        return (
            GraphRunner.supports_uop(batch_devs, new_call)
            and whole
            and new_call.src[0].arg.globals == tuple(range(len(arguments)))
            and all(isinstance(n, int) for n in new_call.src[0].arg.global_size)
        )
