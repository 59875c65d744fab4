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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lama.errors import LamaError


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
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of what fails")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every check as it is made, then the problems. Returns 1 if there are any."""
    lines: list[Line] = []
    for check in (machine, packages, caches, compiler, device, kernel, weights):
        for line in attempt(check, lines, args.verbose):
            topic = "" if lines and lines[-1].topic == line.topic else line.topic
            print(f"{topic:<10}{'! ' if line.problem else '  '}{line.text}", flush=True)
            lines.append(line)
    problems = [line.problem for line in lines if line.problem]
    print()
    for problem in problems:
        print(f"! {problem}")
    print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "all is well")
    return 1 if problems else 0


def attempt(check: Callable[[], Iterator[Line]], before: list[Line], verbose: bool = False) -> Iterator[Line]:
    """The lines of a check; if it breaks, one line that says so, and the other checks go on.

    A device that fails after its compiler, its cache or the device itself did is not a problem of its own.
    """
    from lama.compiler import explain

    try:
        yield from check()
    except Exception as error:
        if verbose:
            import traceback

            traceback.print_exc()
        reason = str(error) if isinstance(error, LamaError) else explain(error)
        reason = reason or f"{type(error).__name__}: {error}".splitlines()[0]
        if check in (device, kernel) and any(line.problem and line.topic in ("caches", "compiler", "device") for line in before):
            yield Line(check.__name__, "failed, for the reason above")
        else:
            yield Line(check.__name__, "failed", f"{check.__name__}: {reason}")


def machine() -> Iterator[Line]:
    from lama.compiler import cores

    memory = f", {memory_bytes() / 2**30:.1f} GiB of memory" if memory_bytes() else ""
    yield Line("machine", f"{platform.system()} {platform.machine()}, {cores()} cores{memory}")
    yield Line("machine", f"Python {platform.python_version()} at {sys.executable}")


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
    from tinygrad.helpers import CACHEDB

    from lama.compiler import cache_folder

    yield cache("tinygrad's compiled kernels", Path(CACHEDB), "Set CACHEDB to a file in a folder that is, or CACHELEVEL=0 to do without")
    # lama goes without its own where it cannot be written: no problem.
    yield Line("caches", cache("lama's", cache_folder()).text)


def cache(what: str, path: Path, advice: str = "") -> Line:
    """Where a cache is, its size and whether it can be written."""
    folder = path.parent if path.is_file() or path.suffix else path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    writable = can_write(folder) and (not path.is_file() or os.access(path, os.W_OK))
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB" if files else "empty"
    text = f"{what}: {path}, {size}, {'writable' if writable else 'not writable'}"
    problem = "" if writable else f"the cache must be writable; got {path}. {advice}"
    if writable and path.is_file() and path.suffix == ".db" and (broken := database_error(path)):
        problem = f"the cache must be a database; got {path} ({broken}). Delete it"
    return Line("caches", text, problem)


def can_write(folder: Path) -> bool:
    """Tried, not asked: what the permission bits say is not true for root or on a read-only file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def database_error(path: Path) -> str:
    try:
        connection = sqlite3.connect(path, timeout=60)
        try:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return str(error)
    return ""


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
    from lama.compiler import ensure_compiler

    ensure_compiler()
    from tinygrad import Device

    try:
        chosen = Device.DEFAULT
    except RuntimeError:  # no usable devices
        chosen = "CPU"
    Device[chosen]  # opened here, so that its error says what is wrong with it
    others = ", ".join(d for d in Device.get_available_devices() if d != chosen)
    yield Line("device", f"{chosen}; also here: {others or 'no other'}")


def kernel() -> Iterator[Line]:
    """One small product on the device, through the function that all layers use."""
    from lama.compiler import ensure_compiler

    ensure_compiler()
    from tinygrad import Device, Tensor

    from lama.kernels import matmul

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
