"""`lama doctor`: check the installation and list its problems."""

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

from lama.cli import Verbs
from lama.errors import LamaError, first_line, quoted
from lama.files import quoted_path

TINYGRAD = ("DEV", "JIT", "DEBUG", "BEAM", "PARALLEL", "DEFAULT_FLOAT", "CACHELEVEL", "CACHEDB")
VARIABLES = (*TINYGRAD, "XDG_CACHE_HOME", "CC", "HF_HOME", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Line:
    """One finding. `problem` says what is wrong and what to do, or is empty."""

    topic: str
    text: str
    problem: str = ""


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="check the installation",
        description="Print the device, the compiler, caches, versions and places of weights; exit with 1 if "
        "lama cannot work.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the result of every check, then the problems; returns 1 if there are any."""
    lines: list[Line] = []
    for check in (machine, packages, caches, compiler, device, kernel, weights):
        for line in attempt(check, lines, args.traceback):
            topic = "" if lines and lines[-1].topic == line.topic else line.topic
            mark = "! " if line.problem else "  "
            print(f"{topic:<10}{mark}{line.text}", flush=True)
            lines.append(line)
    problems = [line.problem for line in lines if line.problem]
    print()
    for problem in problems:
        print(f"! {problem}")
    print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "all is well")
    return 1 if problems else 0


def attempt(check: Callable[[], Iterator[Line]], before: list[Line], trace: bool = False) -> Iterator[Line]:
    """Yield the lines of a check, and one line if it fails.

    A kernel or device that fails after its device or compiler is not another problem, nor is a reason that
    an earlier line gave.
    """
    from lama.runtime.compiler import explain

    try:
        yield from check()
    except Exception as error:
        if trace:
            import traceback

            traceback.print_exc()
        reason = str(error) if isinstance(error, LamaError) else explain(error)
        reason = reason or f"{type(error).__name__}: {first_line(error)}"
        failed = {line.topic for line in before if line.problem}
        follows = check in (device, kernel) and failed & {"compiler", "device"}
        if follows or any(line.problem.endswith(reason) for line in before):
            yield Line(check.__name__, "failed, for the reason above")
        else:
            yield Line(check.__name__, "failed", f"{check.__name__}: {reason}")


def machine() -> Iterator[Line]:
    from lama.host import cores, memory_bytes
    from lama.runtime.compiler import asked_threads

    memory = f", {memory_bytes() / 2**30:.1f} GiB of memory" if memory_bytes() else ""
    yield Line("machine", f"{platform.system()} {platform.machine()}, {cores()} cores{memory}")
    yield Line("machine", f"Python {platform.python_version()} at {sys.executable}")
    names = [name for name in os.environ if name.startswith("LAMA_") or name in VARIABLES]
    if names:
        given = ", ".join(f"{name}={quoted(os.environ[name], plain=True)}" for name in names)
        yield Line("machine", f"set: {given}")
    asked_threads()


def packages() -> Iterator[Line]:
    """Compare the versions of lama's dependencies with its pins."""
    from lama.runtime.release import TESTED

    try:
        wanted = [r for r in metadata.requires("lama") or [] if "extra ==" not in r]
        yield Line("packages", f"lama {metadata.version('lama')} at {Path(__file__).parent.parent}")
    except metadata.PackageNotFoundError:
        advice = "lama must be installed with its dependencies. Run: pip install -e ."
        yield Line("packages", "lama is not installed", advice)
        return
    for requirement in sorted(wanted):
        name, _, pin = re.split(r"[;\s]", requirement)[0].partition("==")
        name = re.split(r"[<>=!~\[]", name)[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            advice = f"{name} must be installed. Run: pip install '{requirement}'"
            yield Line("packages", f"{name} is missing", advice)
            continue
        wrong = f"{name} must be version {pin}; got {version}. Run: pip install '{requirement}'"
        untested = ", not a tested release" if name == "tinygrad" and version not in TESTED else ""
        yield Line("packages", f"{name} {version}{untested}", wrong if pin and version != pin else "")


def caches() -> Iterator[Line]:
    from lama.host import cache_folder
    from lama.runtime.kernel_cache import database, is_used

    if not is_used():
        yield Line("caches", "tinygrad's compiled kernels: none, as CACHELEVEL is 0")
    else:
        advice = "Set CACHEDB to a file in a writable folder, or CACHELEVEL=0 to use no cache"
        yield cache("tinygrad's compiled kernels", Path(database()), advice)
    # lama works without its own cache: no problem.
    yield Line("caches", cache("lama's", cache_folder()).text)


def cache(what: str, path: Path, advice: str = "") -> Line:
    """The path of a cache, its size, and whether it can be written.

    With `advice` it is a database, and a damaged or read-only one is a problem.
    """
    is_file = os.path.isfile(path)
    folder = path.parent if is_file or path.suffix else path
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    writable = can_write(folder) and (not is_file or os.access(path, os.W_OK))
    files = [path] if is_file else []
    if os.path.isdir(path):
        files = [file for file in path.rglob("*") if file.is_file()]
    size = f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB" if files else "empty"
    text = f"{what}: {quoted_path(path)}, {size}, {'writable' if writable else 'not writable'}"
    problem = "" if writable else f"the cache must be writable; got {quoted_path(path)}. {advice}"
    if advice and writable and os.path.exists(path) and (broken := database_error(path)):
        got = f"{quoted_path(path)} ({broken})"
        problem = f"the cache must be a database; got {got}. The next run replaces a damaged one"
    return Line("caches", text, problem)


def can_write(folder: Path) -> bool:
    """Write a file to find out: permissions mean nothing to root, or on a read-only or full file system."""
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
    """Compile a line of C: tinygrad's cache of kernels would hide a compiler that does not work."""
    from lama.runtime import compiler as compilers

    try:
        found = compilers.find_compiler()
    except LamaError as none:
        yield Line("compiler", "none", "" if not compilers.needs_compiler() else str(none))
        return
    yield Line("compiler", f"{found.version} (from {found.kind})")
    why = found.probe()
    wrong = compilers.not_clang(found, why) if why and compilers.needs_compiler() else ""
    state = f", does not work: {why}" if why else ""
    yield Line("compiler", f"{found.path}{state}", wrong)


def device() -> Iterator[Line]:
    from tinygrad import Device

    from lama.runtime.device import device_reason, open_device

    open_device()  # its error explains the problem
    chosen = Device.DEFAULT
    others = ", ".join(d for d in Device.get_available_devices() if d != chosen)
    yield Line("device", f"{chosen} ({device_reason()}); also here: {others or 'no other'}")


def kernel() -> Iterator[Line]:
    """Compute one small product on the device, with the function that all layers use."""
    from tinygrad import Device, Tensor

    from lama.ops import matmul
    from lama.runtime.device import open_device

    open_device()

    started, where = time.perf_counter(), Device.DEFAULT
    a, b = Tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), Tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    result, right = matmul(a, b).tolist(), [[4.0, 5.0], [10.0, 11.0]]
    seconds = time.perf_counter() - started
    wrong = f"a product on {where} is wrong: {result} instead of {right}. Try another device with DEV=CPU"
    text = f"a matrix product on {where} took {seconds:.2f} s"
    yield Line("kernel", text, "" if result == right else wrong)


def weights() -> Iterator[Line]:
    """Look for GPT-2 and the bundled model; nothing is downloaded."""
    from lama.checkpoints.hub import EMBEDDED, NotFound, find, weight_folders

    yield Line("weights", f"looked for in {', '.join(map(str, weight_folders()))} and the Hugging Face cache")
    for name in ("gpt2", EMBEDDED):
        try:
            found = find(name, offline=True)
            size = sum(file.stat().st_size for file in found.path.rglob("*") if file.is_file())
            yield Line("weights", f"{name}: {found.path}, {size / 1e6:.1f} MB")
        except NotFound:
            if name == EMBEDDED:
                yield Line(
                    "weights", f"{name}: missing", f"the bundled model {name} is missing. Reinstall lama"
                )
            else:
                where = "put config.json and model.safetensors into weights/gpt2/"
                yield Line("weights", f"{name}: not found; lama downloads it when it can, or {where}")
