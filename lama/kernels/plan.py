"""A captured step without tinygrad: its compiled kernels and what they read and write, as plain data.

TinyJit's replay still costs Python for every call, and a capture costs a new process a second: tinygrad schedules, lowers and
matches patterns for kernels whose code it has kept. What it arrives at is a list of calls. Here that list is run by pool.c as
it stands, and kept in tinygrad's cache on the disk for the next process.
"""

import ctypes
import functools
import hashlib
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.device import Buffer, MultiBuffer, TinyELF
from tinygrad.engine.realize import resolve_params
from tinygrad.helpers import DEBUG, PROFILE, ContextVar, diskcache_get, diskcache_put
from tinygrad.uop.ops import Ops

from lama.jit import capture_at_once
from lama.kernels.pool import CHUNK, call_words, pool, threads
from lama.kernels.program import is_fast

TABLE = "lama_plan"  # in tinygrad's cache
TOKENS = "tokens"
Place = tuple[int, int]  # a buffer's number, and the first byte in it


class Recipe(NamedTuple):
    """All that a step consists of, in plain data."""

    programs: list[tuple[str, bytes, int | None]]
    """Name, compiled code, and which argument is the slice's number."""
    buffers: list[str | int]
    """The name of one that is given, or the bytes of one that only the step uses."""
    calls: list[tuple[int, int, list[Place | str]]]
    """The program's number, how many slices, and the arguments: buffers, then variables by name."""
    result: Place


class Plan:
    """A recipe with its programs loaded and its buffers in place."""

    def __init__(self, recipe: Recipe, given: Mapping[str, Buffer]):
        from tinygrad.runtime.ops_cpu import CPUProgram  # opens the device

        cpu: Any = Device["CPU"]
        self._buffers = [given[b] if isinstance(b, str) else Buffer("CPU", b, dtypes.uint8) for b in recipe.buffers]
        at = [address(b) for b in self._buffers]
        self._programs = []
        for name, code, place in recipe.programs:
            slots = () if place is None else (("core_id", place, dtypes.int32, ()),)
            self._programs.append(CPUProgram(cpu, TinyELF(code, name, cpu.renderer.target, slots)))
        words: list[int] = []
        self._starts: list[int] = []
        self._variables: list[tuple[int, str]] = []
        for program, slices, arguments in recipe.calls:
            self._starts.append(len(words))
            self._variables += [(len(words) + 4 + i, a) for i, a in enumerate(arguments) if isinstance(a, str) and a != "core_id"]
            words += call_words(self._programs[program], slices, [0 if isinstance(a, str) else at[a[0]] + a[1] for a in arguments])
        self._words = (ctypes.c_uint64 * len(words))(*words)
        self.result = at[recipe.result[0]] + recipe.result[1]
        """Where it is in memory; the next run writes over it."""

    def run(self, variables: Mapping[str, int]) -> None:
        for word, name in self._variables:
            self._words[word] = variables[name]
        run, at, n = pool().run, ctypes.addressof(self._words), len(self._starts)
        for first in range(0, n, CHUNK):
            run(at + 8 * self._starts[first], min(CHUNK, n - first))


class Step:
    """A function of tokens (B, T) and of a bound variable that gives float32 numbers: captured once, then replayed.

    `state` has by name every tensor that the function reads and that outlives it, all of them stored. On the CPU the captured
    step is a Plan, and one that was made before is found on the disk: made by this code, on such a machine, for a step of
    this `key` and a state of these shapes.
    """

    def __init__(self, function: Callable[[Tensor, UOp], Tensor], tokens: tuple[int, int], state: Mapping[str, Tensor], key: str):
        some = next(iter(state.values()))
        self._tokens = Tensor(np.zeros(tokens, np.int32), device=some.device).realize()
        self._step = capture_at_once(function)
        self._plan: Plan | None = None
        # With these two, tinygrad says what it runs.
        self._may_plan = some.device == "CPU" and is_fast(some) and not DEBUG >= 2 and not PROFILE
        if self._may_plan:
            self._given = {name: buffer_of(t).base for name, t in {**state, TOKENS: self._tokens}.items()}
            shapes = [(name, str(t.dtype), t.shape, self._given[name].nbytes) for name, t in state.items()]
            self._key = digest(repr([key, tokens, threads(), shapes]).encode())
            if (found := diskcache_get(TABLE, self._key)) and found[0] == maker():
                self._plan, self._shape = Plan(Recipe(*found[1]), self._given), found[2]

    def __call__(self, tokens: np.ndarray, variable: UOp) -> np.ndarray:
        if self._plan is None:
            return self._captured(tokens, variable)
        ctypes.memmove(address(self._given[TOKENS]), np.ascontiguousarray(tokens, np.int32).ctypes.data, 4 * tokens.size)
        name, value = variable.unbind()
        self._plan.run({name.expr: value})
        out = np.empty(self._shape, np.float32)
        ctypes.memmove(out.ctypes.data, self._plan.result, out.nbytes)
        return out

    def _captured(self, tokens: np.ndarray, variable: UOp) -> np.ndarray:
        """By tinygrad; a plan for the next time, if it can be one."""
        given = Tensor(tokens.astype(np.int32), device=self._tokens.device).realize()
        out = self._step(given, variable)
        if self._may_plan:
            self._may_plan = False
            captured = self._step.jit.captured  # None with JIT=0
            if captured is not None and (made := recipe_of(captured.linear, given, out, self._given)) is not None:
                self._plan, self._shape = Plan(made, self._given), tuple(map(int, out.shape))
                diskcache_put(TABLE, self._key, (maker(), tuple(made), self._shape))
        return out.numpy()


def recipe_of(linear: UOp, tokens: Tensor, out: Tensor, given: Mapping[str, Buffer]) -> Recipe | None:
    """What TinyJit captured, or None if not all of it is kernels of plain sizes, or they read what nobody gives or writes."""
    programs: dict[UOp, int] = {}
    code: list[tuple[str, bytes, int | None]] = []
    numbers = {id(buffer): i for i, buffer in enumerate(given.values())}
    buffers: list[str | int] = list(given)
    calls: list[tuple[int, int, list[Place | str]]] = []
    numbers[id(buffer_of(tokens).base)] = numbers[id(given[TOKENS])]
    known = set(numbers)

    def place(buffer: Buffer) -> Place:
        base = buffer.base
        if id(base) not in numbers:
            numbers[id(base)] = len(buffers)
            buffers.append(base.nbytes)
        return numbers[id(base)], buffer.offset

    for call in (inner for outer in linear.src for inner in kernels_in(outer)):
        program = call.src[0]
        if program.op is not Ops.PROGRAM or not all(isinstance(n, int) for n in program.arg.global_size):
            return None
        arguments: list[Any] = [u.buffer for u in resolve_params(call, (tokens.uop,))]
        arguments = [arguments[i] for i in program.arg.globals]
        if any(isinstance(b, MultiBuffer) or b.device != "CPU" for b in arguments) or len(arguments) + len(program.arg.vars) > 63:
            return None
        if any(id(arguments[i].base) not in known for i in program.arg.ins):
            return None
        known |= {id(arguments[i].base) for i in program.arg.outs}
        if program not in programs:
            elf = program.to_elf()
            programs[program] = len(code)
            code.append((elf.name, elf.lib, next((slot for name, slot, *_ in elf.signature if name == "core_id"), None)))
        places: list[Place | str] = [*map(place, arguments), *(v.expr for v in program.arg.vars)]
        calls.append((programs[program], int(program.arg.global_size[0]), places))
    return Recipe(code, buffers, calls, place(buffer_of(out)))


def kernels_in(call: UOp) -> tuple[UOp, ...]:
    """The kernels' calls that TinyJit put together for a `graph`, or the call itself."""
    what = call.src[0]
    return what.src[0].src if what.op is Ops.CUSTOM_FUNCTION and what.arg == "graph" else (call,)


def buffer_of(tensor: Tensor) -> Buffer:
    """A stored tensor's."""
    buffer = tensor.uop.buffer
    assert isinstance(buffer, Buffer)
    return buffer.ensure_allocated()


def address(buffer: Buffer) -> int:
    return int(buffer.ensure_allocated().get_buf(buffer.device).va_addr)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def maker() -> str:
    """What a recipe depends on beside its step: lama's code, tinygrad's version and settings, the processor."""
    package = Path(__file__).parent.parent
    code = [path.read_bytes() for path in sorted(package.rglob("*")) if path.suffix in (".py", ".c", ".h")]
    settings = {key: variable.value for key, variable in ContextVar._cache.items()}
    return digest(repr([[digest(c) for c in code], version("tinygrad"), settings, processor()]).encode())


def processor() -> str:
    """What it calls itself and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
