"""A captured step without tinygrad: its compiled kernels and their arguments, as plain data.

TinyJit's replay runs Python for every call. A capture costs a new process a second, in which tinygrad
schedules and lowers kernels that it has cached. The result is a list of calls. Here threads.c runs that list,
and tinygrad's cache on the disk keeps it for the next process.
"""

import ctypes
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor, UOp, dtypes

from lama.host import cpu_model, may_use_amx
from lama.runtime.buffers import address_of, buffer_of, from_array, write
from lama.runtime.capture import CapturedStep
from lama.runtime.internals import (
    DEBUG,
    PROFILE,
    Buffer,
    ContextVar,
    MultiBuffer,
    Ops,
    Program,
    TinyELF,
    device_of,
    diskcache_get,
    diskcache_put,
    load_program,
    resolve_params,
)
from lama.runtime.kernel import is_fast
from lama.runtime.release import installed
from lama.runtime.strides import without_reshapes
from lama.runtime.threads import call_words, run_calls, threads
from lama.shapes import Array

TABLE = "lama_calls"  # in tinygrad's cache
MOST_ARGUMENTS = 62
Place = tuple[int, int]  # a buffer's number, and the first byte in it


class CallList(NamedTuple):
    """A whole step in plain data."""

    programs: list[tuple[str, bytes, int | None]]
    """The name, the compiled code, and which argument is the slice's number."""
    buffers: list[str | int]
    """The name of a given buffer, or the number of bytes of one that only the step uses."""
    calls: list[tuple[int, int, list[Place]]]
    """The program's number, how many slices, and the buffers that are its arguments."""
    result: Place


class LoadedCalls:
    """A call list with its programs loaded and its buffers in place.

    With `like`, loaded from the same list, it shares that one's programs and temporary buffers.
    """

    def __init__(self, calls: CallList, given: Mapping[str, "Buffer"], like: "LoadedCalls | None" = None):
        self.list = calls
        sizes = [size for size in calls.buffers if isinstance(size, int)]
        self._own: list[Buffer] = like._own if like else [Buffer("CPU", n, dtypes.uint8) for n in sizes]
        self._programs: list[Program] = like._programs if like else list(map(_loaded, calls.programs))
        own = iter(self._own)
        buffers = [given[b] if isinstance(b, str) else next(own) for b in calls.buffers]
        at = [address_of(b) for b in buffers]
        words: list[int] = []
        self._starts: list[int] = []
        for program, slices, arguments in calls.calls:
            self._starts.append(len(words))
            addresses = [at[buffer] + first for buffer, first in arguments]
            slot = [] if calls.programs[program][2] is None else [0]  # for the slice's number
            words += call_words(self._programs[program], slices, [*addresses, *slot])
        self._words = (ctypes.c_uint64 * len(words))(*words)
        self.result = at[calls.result[0]] + calls.result[1]
        """The address of the result, which the next run overwrites."""

    def run(self) -> None:
        """Run all calls, in order."""
        run_calls(self._words, self._starts)


def _loaded(program: tuple[str, bytes, int | None]) -> Program:
    name, code, place = program
    slots = () if place is None else (("core_id", place, dtypes.int32, ()),)
    return load_program(TinyELF(code, name, device_of("CPU").renderer.target, slots))


class CachedStep:
    """A function of int32 tensors that returns float32 numbers: captured once, then replayed.

    `inputs` has the shapes of the arguments, in order. `state` has, by name, every other tensor that the
    function reads and that exists before and after a call, all of them realised. On the CPU the captured step
    is a `CallList`, which is read from the disk if the same code has saved it. The saved list must be for the
    same kind of machine, the same `key` and a state of the same shapes. If all this is true of `like`, both
    share its call list and temporary memory. Not safe for two threads at once.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Mapping[str, tuple[int, ...]],
        state: Mapping[str, Tensor],
        key: str,
        like: "CachedStep | None" = None,
    ):
        some = next(iter(state.values()))
        device = str(some.device)
        self._inputs = {
            name: from_array(np.zeros(shape, np.int32), dtypes.int32, device)
            for name, shape in inputs.items()
        }
        self._step = CapturedStep(function)
        self._calls: LoadedCalls | None = None
        self._shape: tuple[int, ...] = ()
        # With DEBUG and PROFILE, tinygrad shows what it runs.
        self._is_cachable = device == "CPU" and is_fast(some) and not DEBUG >= 2 and not PROFILE
        if self._is_cachable:
            self._given = {name: buffer_of(t).base for name, t in {**state, **self._inputs}.items()}
            # The op tells weights in tiles, which are views, from weights in rows: their kernels differ.
            layouts = [
                (name, str(t.dtype), t.shape, str(without_reshapes(t.uop).op), self._given[name].nbytes)
                for name, t in state.items()
            ]
            self._key = digest(repr([key, sorted(inputs.items()), threads(), layouts]).encode())
            if like and like._calls and like._key == self._key:
                self._calls = LoadedCalls(like._calls.list, self._given, like._calls)
                self._shape = like._shape
            elif (found := diskcache_get(TABLE, self._key)) and found[0] == code_digest():
                self._calls, self._shape = LoadedCalls(CallList(*found[1]), self._given), found[2]

    def __call__(self, **inputs: Array) -> NDArray[np.float32]:
        """The result for these numbers."""
        if self._calls is None:
            return self._captured(inputs)
        for name, array in inputs.items():
            numbers = np.ascontiguousarray(array, np.int32)
            ctypes.memmove(address_of(self._given[name]), numbers.ctypes.data, numbers.nbytes)
        self._calls.run()
        out = np.empty(self._shape, np.float32)
        ctypes.memmove(out.ctypes.data, self._calls.result, out.nbytes)
        return out

    def _captured(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """The result by tinygrad; saves a call list for the next time, if the step can be one."""
        given = [write(tensor, inputs[name].astype(np.int32)) for name, tensor in self._inputs.items()]
        out = self._step(*given)
        if self._is_cachable:
            self._is_cachable = False
            captured = self._step.jit.captured  # None with JIT=0
            calls = None if captured is None else call_list_of(captured.linear, given, out, self._given)
            if calls is not None:
                self._calls, self._shape = LoadedCalls(calls, self._given), tuple(map(int, out.shape))
                diskcache_put(TABLE, self._key, (code_digest(), tuple(calls), self._shape))
        return out.numpy()


def call_list_of(
    linear: UOp, inputs: list[Tensor], out: Tensor, given: Mapping[str, "Buffer"]
) -> CallList | None:
    """The calls that TinyJit captured; None unless all are kernels of static sizes with known buffers.

    A buffer is known if it is given or an earlier call writes it.
    """
    programs: dict[UOp, int] = {}
    code: list[tuple[str, bytes, int | None]] = []
    numbers = {id(buffer): i for i, buffer in enumerate(given.values())}
    buffers: list[str | int] = list(given)
    calls: list[tuple[int, int, list[Place]]] = []
    known = set(numbers)

    def place(buffer: "Buffer") -> Place:
        base = buffer.base
        if id(base) not in numbers:
            numbers[id(base)] = len(buffers)
            buffers.append(base.nbytes)
        return numbers[id(base)], buffer.offset

    uops = tuple(tensor.uop for tensor in inputs)
    for call in (inner for outer in linear.src for inner in kernels_in(outer)):
        program = call.src[0]
        if program.op is not Ops.PROGRAM or not all(isinstance(n, int) for n in program.arg.global_size):
            return None
        if any(variable.expr != "core_id" for variable in program.arg.vars):
            return None
        resolved = [u.buffer for u in resolve_params(call, uops)]
        found = [resolved[i] for i in program.arg.globals]
        arguments = [b for b in found if not isinstance(b, MultiBuffer) and b.device == "CPU"]
        if len(arguments) < len(found) or len(arguments) > MOST_ARGUMENTS:
            return None
        if any(id(arguments[i].base) not in known for i in program.arg.ins):
            return None
        known |= {id(arguments[i].base) for i in program.arg.outs}
        if program not in programs:
            elf = program.to_elf()
            programs[program] = len(code)
            place_of_slice = next((slot for name, slot, *_ in elf.signature if name == "core_id"), None)
            code.append((elf.name, elf.lib, place_of_slice))
        calls.append((programs[program], int(program.arg.global_size[0]), [place(b) for b in arguments]))
    return CallList(code, buffers, calls, place(buffer_of(out)))


def kernels_in(call: UOp) -> tuple[UOp, ...]:
    """The kernel calls that TinyJit batched in a `graph`, or the call itself."""
    what = call.src[0]
    return what.src[0].src if what.op is Ops.CUSTOM_FUNCTION and what.arg == "graph" else (call,)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def code_digest() -> str:
    """The digest of all that call lists depend on: lama's code, tinygrad's release and settings, the CPU."""
    settings = {key: variable.value for key, variable in ContextVar._cache.items()}
    machine = [cpu_model(), may_use_amx()]
    return digest(repr([source_digest(), installed(), settings, machine]).encode())


@functools.cache
def source_digest() -> str:
    """The digest of lama's code."""
    package = Path(__file__).parent.parent
    code = [path.read_bytes() for path in sorted(package.rglob("*")) if path.suffix in (".py", ".c", ".h")]
    return digest(repr([digest(content) for content in code]).encode())
