"""A thread pool for tinygrad's single-threaded CPU device, and the replay of a captured step in one call.

tinygrad runs a kernel's slices (`core_id`) one after the other, and calls every kernel from Python. Here a
program's slices are shared among LAMA_THREADS threads (default: the cores that this process may use). A step
that TinyJit has captured is a list of calls that threads.c runs. Results do not depend on which thread takes
a slice: slices write different places.
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources
from typing import TypeVar

from tinygrad import UOp

from lama.host import cores
from lama.runtime.compiler import asked_threads
from lama.runtime.internals import (
    NUM_CPU_THREADS,
    Buffer,
    CallableProgram,
    Compiled,
    GraphRunner,
    Memory,
    Ops,
    Program,
    TinyELF,
    device_of,
    get_call_arg_uops,
    getenv,
    is_tested,
    load_program,
)

SPIN = 100e-6  # seconds that a thread waits for the next kernel before it sleeps
CHUNK = 32  # calls between two checks for signals: Ctrl-C should not wait for a whole step
NO_PLACE = 64  # the place of the slice's number for a kernel that does not take one
FUNCTIONS = (
    "pthread_mutex_lock",
    "pthread_mutex_unlock",
    "pthread_cond_wait",
    "pthread_cond_signal",
    "sched_yield",
    "clock_gettime",
)


T = TypeVar("T")
R = TypeVar("R")


def threads() -> int:
    """The number of threads that kernels run on. Raises UsageError."""
    # tinygrad's number respects a container's limit.
    return asked_threads() or max(1, min(cores(), NUM_CPU_THREADS.value if is_tested() else cores()))


def on_threads(work: Callable[[T], object], items: Iterable[T], most: int = 64) -> None:
    """Do `work` for each item, on up to `most` threads, or on the caller's if no other can be started."""
    items = list(items)
    with ThreadPoolExecutor(min(most, threads())) as executor:
        try:
            list(executor.map(work, items))
        except RuntimeError:  # can't start new thread
            list(map(work, items))


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of `work`, in order; threads compute a few of them in advance."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads()) as executor:
        for item in items:
            try:
                pending.append(executor.submit(work, item))
            except RuntimeError:  # can't start new thread
                while pending:
                    yield pending.popleft().result()
                yield work(item)
            if len(pending) > threads():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def use_all_cores(device: str) -> None:
    """Let this CPU device run its programs on the pool, and its captured steps as call lists."""
    cpu = device_of(device)
    # On Windows and with tinygrad's HCQ2, programs are called in other ways.
    if cpu.graph is None and sys.platform != "win32" and not getenv("HCQ2"):
        cpu.runtime_t, cpu.graph = functools.partial(PooledProgram, cpu.runtime_t), CallGraph


class ThreadPool:
    """Native threads that sleep until there are slices to run; the caller is one of the `count`."""

    def __init__(self, count: int):
        self._memory = ctypes.create_string_buffer(16384)
        words = (ctypes.c_uint64 * 2048).from_buffer(self._memory)
        self._at = (ctypes.addressof(words) + 63) // 64 * 64
        text = resources.files("lama.runtime").joinpath("threads.c").read_text("utf-8")
        self._run = load_c(f"#define WORKER 0\n{text}", "lama_run")
        worker = load_c(f"#define WORKER 1\n{text}", "lama_worker")
        state = (ctypes.c_uint64 * 11).from_address(self._at)
        self._alone = (ctypes.c_uint64 * 2).from_address(self._at + 8 * len(state))
        mutex, condition = self._at + 8192, self._at + 8704
        # If the functions are missing or no more threads can be started, continue with fewer.
        with contextlib.suppress(AttributeError, OSError, RuntimeError):
            library = ctypes.CDLL(None)
            addresses = [
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in FUNCTIONS
            ]
            library.pthread_mutex_init(ctypes.c_void_p(mutex), None)
            library.pthread_cond_init(ctypes.c_void_p(condition), None)
            state[:] = [*addresses, mutex, condition, time.CLOCK_MONOTONIC, int(SPIN * 1e9), count]
            for _ in range(count - 1):
                threading.Thread(target=self._wait_for_work, args=(worker,), daemon=True).start()

    def _wait_for_work(self, worker: Program) -> None:
        # Only threads that run Python may handle signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        worker.fxn(ctypes.c_uint64(self._at))

    def share_again(self) -> None:
        """Forget that a thread was late: share the next call among all threads."""
        self._alone[:] = [0, 0]

    def run(self, calls: int, count: int) -> None:
        """Run `count` calls, which are consecutive in memory from address `calls` on."""
        self._run.fxn(ctypes.c_uint64(self._at), ctypes.c_uint64(calls), ctypes.c_uint64(count))


@functools.cache
def pool() -> ThreadPool:
    """The thread pool of this process."""
    return ThreadPool(threads())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads stay in the parent


def run_calls(
    words: "ctypes.Array[ctypes.c_uint64]", starts: list[int], first: int = 0, last: int | None = None
) -> None:
    """Run calls `first` to `last` - 1, by default all, in order; `starts` has the first word of each."""
    run, at, n = pool().run, ctypes.addressof(words), len(starts) if last is None else last
    for i in range(first, n, CHUNK):
        run(at + 8 * starts[i], min(CHUNK, n - i))


def load_c(source: str, name: str) -> Program:
    """The function of a C file, compiled and loaded as kernels are, but in no graph."""
    device = device_of("CPU")
    return load_program(TinyELF(device.compiler.compile_cached(source), name, device.renderer.target, ()))


def call_words(program: Program, slices: int, arguments: list[int]) -> list[int]:
    """A call as the numbers that threads.c reads; the arguments start at the fifth."""
    words = next(n for n in (8, 16, 64) if len(arguments) <= n)
    place = program.runtimevars.get("core_id", NO_PLACE)
    return [program.addr, slices, place, words, *arguments, *[0] * (words - len(arguments))]


class PooledProgram:
    """A program of the CPU device whose slices run on all threads."""

    def __init__(self, load: "Callable[[object, TinyELF], CallableProgram]", device: object, elf: "TinyELF"):
        self.program = load(device, elf)

    def __call__(
        self,
        *buffers: Memory,
        global_size: tuple[int, int, int] = (1, 1, 1),
        vals: tuple[int | None, ...] = (),
        **how: object,
    ) -> float | None:
        if global_size[0] == 1:
            return self.program(*buffers, global_size=global_size, vals=vals, **how)
        began = time.perf_counter()
        arguments = [*(b.va_addr for b in buffers), *(v or 0 for v in vals)]
        words = call_words(self.program, global_size[0], arguments)
        calls = (ctypes.c_uint64 * len(words))(*words)
        pool().run(ctypes.addressof(calls), 1)
        return time.perf_counter() - began if how.get("wait") else None


class CallGraph(GraphRunner):
    """A captured step's kernels as one list of calls; a replay rewrites only the arguments that change."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        numbers: list[int] = []
        self._starts: list[int] = []
        for (_, program, buffers, device_vars), runtime in zip(self.calls, self.runtimes, strict=True):
            # Programs that were loaded before `use_all_cores` are not pooled.
            loaded = runtime.program if isinstance(runtime, PooledProgram) else runtime
            assert loaded is not None, "a call that runs no program"
            values = [device_vars.get(v.expr, 0) for v in program.arg.vars]
            arguments = [*(b.get_buf(b.device).va_addr for b in buffers), *values]
            self._starts.append(len(numbers))
            numbers += call_words(loaded, int(program.arg.global_size[0]), arguments)
        self._words = (ctypes.c_uint64 * len(numbers))(*numbers)
        self.bindings = 0

    def __call__(
        self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False
    ) -> float | None:
        began = time.perf_counter()
        self.bindings += 1
        for start, replace in zip(self._starts, self.uop_replace, strict=True):
            for place, i in replace:
                buffer = input_uops[i].buffer
                assert isinstance(buffer, Buffer), "a call list's buffers are on one device"
                self._words[start + 4 + place] = buffer.get_buf(buffer.device).va_addr
        for j, i, value in self.updated_vars(var_vals):
            self._words[self._starts[j] + 4 + len(self.calls[j][2]) + i] = value
        self.rerun()
        return time.perf_counter() - began if wait else None

    def rerun(self, first: int = 0, last: int | None = None) -> None:
        """Run the calls, or a part of them, with the arguments of the last replay."""
        run_calls(self._words, self._starts, first, last)

    def last_writes(self) -> dict[int, int]:
        """For the `id` of each buffer that is written: the number of calls after which it is complete."""
        found: dict[int, int] = {}
        for n, (_, program, buffers, _) in enumerate(self.calls, 1):
            found |= {id(buffers[i].base): n for i in program.arg.outs}
        return found

    @staticmethod
    def supports_uop(batch_devs: "list[Compiled]", new_call: UOp) -> bool:
        """Whether a call can be part of the list."""
        arguments = get_call_arg_uops(new_call)
        # Only whole inputs can be replaced in the list.
        whole = all(a.op is Ops.PARAM or not any(u.op is Ops.PARAM for u in a.toposort()) for a in arguments)
        return (
            GraphRunner.supports_uop(batch_devs, new_call)
            and whole
            and new_call.src[0].arg.globals == tuple(range(len(arguments)))
            and all(isinstance(n, int) for n in new_call.src[0].arg.global_size)
        )
