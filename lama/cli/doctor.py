"""`lama doctor`: what lama finds on this machine, and what is wrong with it."""

import argparse
import os
import platform
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lama.errors import LamaError, first_line, quoted
from lama.files import quoted_path

VARIABLES = (
    *("DEV", "JIT", "DEBUG", "BEAM", "PARALLEL", "DEFAULT_FLOAT", "CACHELEVEL", "CACHEDB", "XDG_CACHE_HOME", "CC"),
    *("HF_HOME", "HF_HUB_OFFLINE"),
)


@dataclass(frozen=True)
class Line:
    """One thing found. `problem` says in plain words what is wrong and what to do; empty if nothing is."""

    topic: str
    text: str
    problem: str = ""


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "doctor",
        help="say what is here and what is wrong",
        description="Print device, compiler, caches, versions and where weights were looked for; exit 1 if lama cannot work.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every check as it is made, then the problems. Returns 1 if there are any."""
    lines: list[Line] = []
    for check in (machine, packages, caches, compiler, device, kernel, weights):
        for line in attempt(check, lines, args.traceback):
            topic = "" if lines and lines[-1].topic == line.topic else line.topic
            print(f"{topic:<10}{'! ' if line.problem else '  '}{line.text}", flush=True)
            lines.append(line)
    problems = [line.problem for line in lines if line.problem]
    print()
    for problem in problems:
        print(f"! {problem}")
    print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "all is well")
    return 1 if problems else 0


def attempt(check: Callable[[], Iterator[Line]], before: list[Line], trace: bool = False) -> Iterator[Line]:
    """The lines of a check; if it breaks, one line that says so, and the other checks go on.

    A device that fails after its compiler or the device itself did is not a problem of its own, nor is a reason that was given.
    """
    from lama.compiler import explain

    try:
        yield from check()
    except Exception as error:
        if trace:
            import traceback

            traceback.print_exc()
        reason = str(error) if isinstance(error, LamaError) else explain(error)
        reason = reason or f"{type(error).__name__}: {first_line(error)}"
        known = check in (device, kernel) and any(line.problem and line.topic in ("compiler", "device") for line in before)
        if known or any(line.problem.endswith(reason) for line in before):
            yield Line(check.__name__, "failed, for the reason above")
        else:
            yield Line(check.__name__, "failed", f"{check.__name__}: {reason}")


def machine() -> Iterator[Line]:
    from lama.compiler import asked_threads, cores

    memory = f", {memory_bytes() / 2**30:.1f} GiB of memory" if memory_bytes() else ""
    yield Line("machine", f"{platform.system()} {platform.machine()}, {cores()} cores{memory}")
    yield Line("machine", f"Python {platform.python_version()} at {sys.executable}")
    if given := {name: value for name, value in os.environ.items() if name.startswith("LAMA_") or name in VARIABLES}:
        yield Line("machine", f"set: {', '.join(f'{name}={quoted(value, plain=True)}' for name, value in given.items())}")
    asked_threads()


def memory_bytes() -> int:
    """The machine's memory, 0 where it cannot be had."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def packages() -> Iterator[Line]:
    """Versions of lama and of what it depends on, held against its pins."""
    try:
        wanted = [r for r in metadata.requires("lama") or [] if "extra ==" not in r]
        yield Line("packages", f"lama {metadata.version('lama')} at {Path(__file__).parent.parent}")
    except metadata.PackageNotFoundError:
        yield Line("packages", "lama is not installed", "lama must be installed for its dependencies to be here. Run: pip install -e .")
        return
    for requirement in sorted(wanted):
        name, _, pin = re.split(r"[;\s]", requirement)[0].partition("==")
        name = re.split(r"[<>=!~\[]", name)[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Line("packages", f"{name} is missing", f"{name} must be installed. Run: pip install '{requirement}'")
            continue
        wrong = f"{name} must be version {pin}; got {version}. Run: pip install '{requirement}'" if pin and version != pin else ""
        yield Line("packages", f"{name} {version}", wrong)


def caches() -> Iterator[Line]:
    from tinygrad.helpers import CACHELEVEL

    from lama.compiler import cache_folder
    from lama.kernel_cache import database

    if CACHELEVEL < 1:
        yield Line("caches", f"tinygrad's compiled kernels: none, as CACHELEVEL is {CACHELEVEL.value}")
    else:
        advice = "Set CACHEDB to a file in a folder that is, or CACHELEVEL=0 to do without"
        yield cache("tinygrad's compiled kernels", Path(database()), advice)
    # lama goes without its own where it cannot be written: no problem.
    yield Line("caches", cache("lama's", cache_folder()).text)


def cache(what: str, path: Path, advice: str = "") -> Line:
    """The place of a cache, its size, and whether it can be written; with `advice`, what is wrong with it as a database."""
    is_file = os.path.isfile(path)
    folder = path.parent if is_file or path.suffix else path
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    writable = can_write(folder) and (not is_file or os.access(path, os.W_OK))
    files = [path] if is_file else [file for file in path.rglob("*") if file.is_file()] if os.path.isdir(path) else []
    size = f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB" if files else "empty"
    text = f"{what}: {quoted_path(path)}, {size}, {'writable' if writable else 'not writable'}"
    problem = "" if writable else f"the cache must be writable; got {quoted_path(path)}. {advice}"
    if advice and writable and os.path.exists(path) and (broken := database_error(path)):
        problem = f"the cache must be a database; got {quoted_path(path)} ({broken}). A damaged one is replaced in the next run"
    return Line("caches", text, problem)


def can_write(folder: Path) -> bool:
    """Tried, not asked: the permission bits mean nothing to root, on a read-only file system and on a full one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            return True
    except OSError:
        return False


def database_error(path: Path) -> str:
    try:
        with closing(sqlite3.connect(path, timeout=5)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            return "" if found == "ok" else first_line(ValueError(found))
    except sqlite3.Error as error:
        return str(error)


def compiler() -> Iterator[Line]:
    """The compiler, tried on a line of C: tinygrad's cache of compiled kernels would hide one that does not work."""
    from lama import compiler as compilers

    try:
        found = compilers.find_compiler()
    except LamaError as none:
        yield Line("compiler", "none", "" if not compilers.needs_compiler() else str(none))
        return
    yield Line("compiler", f"{found.version} (from {found.kind})")
    why = found.probe()
    wrong = compilers.not_clang(found, why) if why and compilers.needs_compiler() else ""
    yield Line("compiler", f"{found.path}{f', does not work: {why}' if why else ''}", wrong)


def device() -> Iterator[Line]:
    from tinygrad import Device

    from lama.device import open_device

    open_device()  # here, so that its error says what is wrong with it
    chosen = Device.DEFAULT
    others = ", ".join(d for d in Device.get_available_devices() if d != chosen)
    yield Line("device", f"{chosen}; also here: {others or 'no other'}")


def kernel() -> Iterator[Line]:
    """One small product on the device, through the function that all layers use."""
    from tinygrad import Device, Tensor

    from lama.device import open_device
    from lama.kernels import matmul

    open_device()

    started = time.perf_counter()
    result = matmul(Tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), Tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])).tolist()
    seconds = time.perf_counter() - started
    right = [[4.0, 5.0], [10.0, 11.0]]
    wrong = f"a product on {Device.DEFAULT} must be right; got {result} instead of {right}. Try another device with DEV=CPU"
    yield Line("kernel", f"a matrix product on {Device.DEFAULT} took {seconds:.2f} s", "" if result == right else wrong)


def weights() -> Iterator[Line]:
    """Where GPT-2 and the model that ships were looked for, and what is there; nothing is downloaded."""
    from lama.checkpoints.hub import EMBEDDED, NotFound, find, weight_folders

    yield Line("weights", f"looked for in {', '.join(map(str, weight_folders()))} and the Hugging Face cache")
    for name in ("gpt2", EMBEDDED):
        try:
            found = find(name, offline=True)
            size = sum(file.stat().st_size for file in found.path.rglob("*") if file.is_file())
            yield Line("weights", f"{name}: {found.path}, {size / 1e6:.1f} MB")
        except NotFound:
            missing = "not here; lama downloads it when it can, or put config.json and model.safetensors into weights/gpt2/"
            broken = f"{EMBEDDED}, the model that ships with lama, must be here. Install lama again"
            yield Line("weights", f"{name}: {missing if name == 'gpt2' else 'missing'}", broken if name == EMBEDDED else "")
