"""Processes that train together over MPI: their messages, and how all end when one is lost.

Every call that waits polls with short sleeps: MPICH would spin and keep the core from other processes. A
thread of each process exchanges heartbeats with the first process.
"""

import importlib.util
import io
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np
from tinygrad import Tensor

from lama import __version__
from lama.atomic import LEFTOVER
from lama.errors import LamaError, UsageError, first_line, note
from lama.host import cores, cpu_model, may_use_amx
from lama.runtime.buffers import empty, host_array
from lama.runtime.release import installed
from lama.runtime.replay import source_digest
from lama.runtime.strides import materialise, shape_of
from lama.shapes import Array
from lama.training.launched import MISSING, RETRY, launched, tell_launcher

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
R = TypeVar("R")

PERIOD = 0.5  # seconds between heartbeats
NAP = 1e-4  # seconds of sleep between two checks for a message
CHUNK = 1 << 27  # the most bytes of a message
FAULT, PULSE = 1, 512  # the first byte of a report of failure, and the bytes of every heartbeat


class Processes:
    """The `size` processes of a run; this one is number `rank`, and number 0 leads.

    All processes must call every method except `fail`, in the same order.
    """

    def __init__(self, timeout: float):
        """`timeout`: seconds without a heartbeat after which a process is lost. Raises LamaError."""
        mpi = _mpi()
        world = mpi.COMM_WORLD
        if world.size != (wanted := launched()):
            raise LamaError(
                f"the launcher started {wanted} processes, but MPI knows {world.size}: mpi4py's library is "
                "not the launcher's. Use that library's mpiexec, or srun --mpi=pmi2"
            )
        self.rank, self.size, self.timeout = world.rank, world.size, timeout
        self.received: list[int] = []
        """Signals that ask this process to stop."""
        self.asked = False
        """Whether this process is asked to stop for another reason."""
        self.stopped = 0
        """The signal that stops all processes after the current step."""
        self.stage = "begin"
        """"train", or what the other processes wait for the first one to do: "begin" or "end"."""
        self._comm, self._pulse = world.Dup(), world.Dup()
        self._errors, self._closing, self._ending = sys.stderr, threading.Event(), threading.Lock()
        self.hosts: list[str] = []
        self.pids: list[int] = []
        self._host = os.environ.get("PMI_HOSTNAME") or mpi.Get_processor_name()
        self._beating = threading.Thread(target=self._beat, args=(mpi.Status,), daemon=True)
        self._beating.start()

    def communicator(self) -> "MPI.Intracomm":
        """A separate communicator, for another thread."""
        return self._comm.Dup()

    def meet(self) -> None:
        """Exchange hosts and versions, and set the number of threads. Raises LamaError for other versions."""
        known = {"lama": f"{__version__} ({source_digest()[:8]})", "Python": sys.version.split()[0]}
        known |= {"NumPy": np.__version__, "tinygrad": str(installed())}
        bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        kind = cpu_model(), may_use_amx()
        found = self.gather((self._host, known, kind, bound, os.getpid()))
        self.hosts, self.pids = [each[0] for each in found], [each[4] for each in found]
        sharing = sum(each[0] == self._host and each[3] == bound for each in found)
        os.environ.setdefault("LAMA_THREADS", str(max(1, cores() // sharing)))
        wanted = found[0][1]
        if self.rank:  # the first one prints all
            sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            return
        for other, versions, *_ in found:
            for name, version in versions.items():
                if version != wanted[name]:
                    got = f"got {wanted[name]} on {self._host} and {version} on {other}"
                    raise LamaError(f"all processes must have the same {name}; {got}. Install the same")
        if len({each[2] for each in found}) > 1:
            note("the hosts' processors differ: results may depend on the number of processes")

    def wait(self, request: Any) -> None:
        """Wait until a message is received or sent."""
        for _ in range(20):
            if request.Test():
                return
            time.sleep(0)
        while not request.Test():
            time.sleep(NAP)

    def share(self, value: T | None = None) -> T:
        """The first process's value, in all processes."""
        tensors: dict[int, Tensor] = {}
        file = io.BytesIO()
        if self.rank == 0:
            _Pickler(file, tensors).dump(value)
        content = np.frombuffer(file.getvalue(), np.uint8)
        size = np.array([len(content)], np.int64)
        self.wait(self._comm.Ibcast(size, 0))
        if self.rank:
            content = np.empty(int(size[0]), np.uint8)
        self.copy([content])
        if self.rank:
            value = _Unpickler(io.BytesIO(content.data), tensors).load()
        self.copy(memory_of({str(i): tensors[i] for i in range(len(tensors))}).values())
        return cast(T, value)

    def copy(self, arrays: Iterable[Array]) -> None:
        """Overwrite arrays with those of the first process, which have the same shapes."""
        for array in arrays:
            content = array.reshape(-1).view(np.uint8)
            for first in range(0, len(content), CHUNK):
                self.wait(self._comm.Ibcast(content[first : first + CHUNK], 0))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        content = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = self.gather_numbers(np.array([len(content)], np.int64), [1] * self.size)
        joined = self.gather_numbers(content, sizes.tolist())
        ends = np.cumsum(sizes)
        return [pickle.loads(joined[e - n : e].data) for e, n in zip(ends, sizes, strict=True)]

    def gather_numbers(self, numbers: Array, counts: Sequence[int]) -> Array:
        """The numbers of all processes, of one dtype, joined in order: `counts` numbers of each."""
        joined = np.empty(sum(counts), numbers.dtype)
        self.wait(self._comm.Iallgatherv(numbers, [joined, counts]))
        return joined

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The results of `work` for all items, in order; each process does its share."""
        items = list(items)
        found = self.gather([work(item) for item in items[self.rank :: self.size]])
        return [found[i % self.size][i // self.size] for i in range(len(items))]

    def send(self, array: Array, source: int, target: int, into: Array) -> None:
        """Copy an array of process `source` into the array `into` of `target`; both are contiguous."""
        if source == target == self.rank:
            into[...] = array
        elif self.rank == source:
            self._in_chunks(self._comm.Isend, array, target)
        elif self.rank == target:
            self._in_chunks(self._comm.Irecv, into, source)

    def _in_chunks(self, start: Callable[..., Any], array: Array, other: int) -> None:
        content = array.reshape(-1).view(np.uint8)
        for first in range(0, len(content), CHUNK):
            self.wait(start(content[first : first + CHUNK], other))

    def share_files(self, folder: Path, write: Callable[[str, bytes], None]) -> None:
        """Copy the first process's `folder`, with `write`, to hosts that lack it or some of its files.

        Raises LamaError for hosts with other files there.
        """
        names = self.share(_sizes(folder))
        here = _sizes(folder)
        found = self.gather(here)
        lacking = [i for i, sizes in enumerate(found) if sizes != names]
        if not here.items() <= names.items():
            raise LamaError(f"{folder} must hold the run's data or nothing; got other files. Remove it")
        writers = {self.hosts[i]: i for i in reversed(lacking)}.values()
        for name in names if lacking else ():
            content = self.share((folder / name).read_bytes() if self.rank == 0 else None)
            if self.rank in writers:
                write(name, content)
        self.wait(self._comm.Ibarrier())

    def ask(self) -> int:
        """The signal that asks this process to stop, or 0."""
        return self.received[0] if self.received else signal.SIGTERM * self.asked

    def close(self, code: int) -> int:
        """Wait for all processes, and return the exit code of the first one."""
        code = self.share(code)
        self.wait(self._comm.Ibarrier())
        self._closing.set()
        self._beating.join()
        return code

    # How all processes end when one is lost

    def fail(self, message: str, code: int) -> NoReturn:
        """End all processes; the first one prints the message."""
        if self.rank == 0:
            self._end(message, code)
        with suppress(Exception):
            self._closing.wait(2 * PERIOD)  # the first process may have the same error, and ends this one
            self._pulse.Isend(_packed(message, code), 0)
            self._closing.wait(10 * PERIOD)  # the answer ends this process
        self._end(message, code)

    def _end(self, message: str, code: int) -> NoReturn:
        """Print, tell the others and exit: MPI can no longer be closed properly."""
        self._ending.acquire()  # never released: only the first message is printed
        try:
            sys.stderr = self._errors
            note(message)
            tell_launcher({"code": code})
            if self.rank == 0:
                for other in range(1, self.size):
                    self._pulse.Isend(_packed("", code), other)
                time.sleep(2 * PERIOD)  # the others read the message before this process ends
            with suppress(OSError, ValueError):
                sys.stdout.flush()
        finally:
            os._exit(code)

    def _beat(self, status_of: Callable[[], Any]) -> None:
        """Send heartbeats, and end this process if others fail or are silent."""
        peers = range(1, self.size) if self.rank == 0 else range(1)
        last = time.monotonic()
        heard = dict.fromkeys(peers, last)
        sent: dict[int, Any] = {}
        pulse, content, status = _packed("", 0, 0), np.empty(PULSE, np.uint8), status_of()
        while not self._closing.wait(PERIOD):
            now = time.monotonic()
            if now - last > self.timeout / 2:  # this process itself was not running
                heard = dict.fromkeys(peers, now)
            last = now
            try:
                while self._pulse.Iprobe(status=status):
                    self._pulse.Recv(content, status.source)
                    heard[status.source] = now
                    if content[0] == FAULT:
                        text = content[2:].tobytes().rstrip(b"\0").decode("utf-8", "replace")
                        if self.rank:
                            os._exit(int(content[1]))
                        self._end(text, int(content[1]))
                for peer in peers:  # after receiving: over TCP, UCX crashes if it sends to one that has ended
                    if peer not in sent or sent[peer].Test():
                        sent[peer] = self._pulse.Isend(pulse, peer)
            except Exception as error:
                self._end(f"MPI failed, and all have ended: {first_line(error)}", RETRY)
            for peer, when in heard.items():
                if now - when > self.timeout:
                    host = self.hosts[peer] if self.hosts else "its host"
                    lost = f"process {peer} on {host} was silent for {self.timeout:g} s"
                    if self.rank > 1:  # if the first process is lost, the second one prints the message
                        time.sleep(PERIOD)
                        os._exit(RETRY)
                    self._end(f"{lost}, and all have ended", RETRY)


class _Pickler(pickle.Pickler):
    """Writes an object without its tensors, since tinygrad's pickles may confuse buffers of equal numbers."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]):
        super().__init__(file)
        self._tensors, self._numbers = tensors, dict[int, int]()

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._tensors)
            self._tensors[len(self._tensors)] = materialise(value).realize()
        return self._numbers[id(value)], shape_of(value), value.dtype, str(value.device)

    def reducer_override(self, value: object) -> Any:
        name = getattr(value, "__name__", "")
        if name and value is getattr(Tensor, name, None):  # such as an MLP's activation
            return getattr, (Tensor, name)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote, with tensors that are still unfilled."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, about: Any) -> Tensor:
        number, shape, dtype, device = about
        if number not in self._tensors:
            self._tensors[number] = empty(*shape, dtype=dtype, device=device)
        return self._tensors[number]


def _mpi() -> Any:
    """mpi4py.MPI, started. Raises UsageError if it is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        raise UsageError(MISSING)
    import mpi4py

    mpi4py.rc.thread_level = "multiple"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"{MISSING}; got: {first_line(error)}") from error
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise LamaError("the MPI library must support threads (MPI_THREAD_MULTIPLE). Use another library")
    return MPI


def _packed(message: str, code: int, kind: int = FAULT) -> Array:
    """The bytes of a heartbeat: its kind, an exit code and a text."""
    content = bytes([kind, code & 255]) + message.encode("utf-8", "replace")
    return np.frombuffer(content[:PULSE].ljust(PULSE, b"\0"), np.uint8)


def _sizes(folder: Path) -> dict[str, int]:
    """The sizes of the complete files in a folder, by name; empty if there is no folder."""
    with suppress(OSError):
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        return {path.name: path.stat().st_size for path in files if not LEFTOVER.fullmatch(path.name)}
    return {}


def memory_of(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """The memory of tensors by name. Raises UsageError for a device that is not the CPU."""
    found = {}
    for name, tensor in tensors.items():
        if (memory := host_array(tensor)) is None:
            raise UsageError(f"several processes train on CPUs only; got {tensor.device}. Use --device CPU")
        found[name] = memory
    return found
