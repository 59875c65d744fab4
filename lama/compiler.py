"""The C compiler that tinygrad's CPU device needs: found, or taken from the PyPI package ziglang.

tinygrad runs `$CC` (default `clang`) as one executable and needs clang's vector types. Machines with only Python have
none; ziglang's wheel carries a complete clang as `zig clang`, which a two-line script in the user's cache folder turns
into one executable. Tried on Linux x86-64. The macOS and Windows branches (a `.cmd` script) were not tried.
"""

import atexit
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from lama.errors import LamaError, UsageError, quoted

WINDOWS = sys.platform == "win32"
INSTALL = "pip install ziglang, or install clang, or set CC to a clang"
OLDEST = 15  # the first clang with numbers of half precision on x86
# What tinygrad's kernels and lama's own ask of a compiler.
PROBE = """typedef float float4 __attribute__((aligned(16),ext_vector_type(4)));
float4 most(float4 x, _Float16 y) { return __builtin_elementwise_max(x, __builtin_elementwise_floor(x + (float)y)); }
"""


@dataclass(frozen=True)
class Compiler:
    """A compiler that was found. Nothing has been run yet: `version` and `probe` do."""

    path: str
    """What tinygrad will run: one executable."""
    kind: str
    """Where it came from: `$CC`, `PATH` or `ziglang`."""

    @cached_property
    def version(self) -> str:
        """The first line of `--version`, or what went wrong."""
        try:
            done = subprocess.run([self.path, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"unknown ({error})"
        return next(iter((done.stdout or done.stderr).splitlines()), "unknown")

    def probe(self) -> str | None:
        """None if it compiles what tinygrad writes, else one line that says why not."""
        machine = platform.machine().lower()
        arch = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
        command = [self.path, "-c", "-x", "c", "-O2", "-ffreestanding", "-nostdlib", f"--target={arch}-none-unknown-elf", "-", "-o", "-"]
        try:
            done = subprocess.run(command, input=PROBE.encode(), capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"it does not run ({error})"
        if done.returncode == 0 and done.stdout.startswith(b"\x7fELF"):
            return None
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return next((line for line in said if "error" in line), f"exit status {done.returncode}, {len(done.stdout)} bytes of output")


def ensure_compiler() -> None:
    """Make sure that tinygrad's CPU device finds a compiler: sets `os.environ["CC"]`, once, without running anything.

    Call before the first kernel. Does nothing where the default device is not the CPU and no compiler can be had.
    Raises LamaError, saying what to install, where one is needed.
    """
    try:
        compiler = find_compiler()
    except LamaError:
        if needs_compiler():
            raise
        return
    os.environ["CC"] = compiler.path
    compile_here()
    # tinygrad remembers what it read; if it already read another CC, make it read again.
    if (helpers := sys.modules.get("tinygrad.helpers")) and helpers.getenv("CC", "clang") != compiler.path:
        helpers.getenv.cache_clear()


def compile_here() -> None:
    """On up to four cores, compile in this process unless PARALLEL is set: tinygrad's workers cost more than they save.

    Measured on two cores, the first training step of transformer.py: 11 to 13 s so, 16 to 28 s with workers.
    """
    if "PARALLEL" in os.environ or cores() > 4:
        return
    os.environ["PARALLEL"] = "0"
    if helpers := sys.modules.get("tinygrad.helpers"):
        helpers.PARALLEL.value = 0


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def asked_threads(given: str | None = None) -> int | None:
    """The number given, else LAMA_THREADS; None where that is not set. Raises UsageError above 64 or, with more cores, 4 for each."""
    given = os.environ.get("LAMA_THREADS", "").strip() if given is None else given
    if not given:
        return None
    most = max(64, 4 * cores())  # kernels have no more than 64 slices
    number = int(given) if given.isdecimal() and len(given) < 10 else 0
    if not 1 <= number <= most:
        rule = f"a whole number from 1 to {most}, as this machine has {cores()} cores"
        raise UsageError(f"LAMA_THREADS or --threads must be {rule}; got {quoted(given, plain=True)}")
    return number


def needs_compiler() -> bool:
    """Whether tinygrad's default device compiles with clang. Opens devices: ask only where no compiler works."""
    from tinygrad import Device
    from tinygrad.helpers import DEV

    try:
        return str(Device.DEFAULT).split(":")[0] == "CPU" and DEV.renderer in ("", "CLANG")
    except RuntimeError:  # no usable devices
        return True


def find_compiler() -> Compiler:
    """`$CC` if set, else clang (then the newest clang-NN) on PATH, else ziglang's. One on PATH that is known to be older than
    OLDEST comes last. Raises LamaError if there is none."""
    if given := os.environ.get("CC"):
        if not (path := shutil.which(given)):
            raise LamaError(f"CC must name one executable, a clang; got CC={given}. Correct it, or unset it and lama finds a clang itself")
        zig, path = _zig(), os.path.abspath(path)
        return Compiler(path, "ziglang" if zig and Path(path).name == _wrapper_name(zig) else "$CC")
    there = [os.path.abspath(path) for path in (shutil.which("clang"), _newest_clang()) if path]
    if path := next(filter(_is_recent, there), None):
        return Compiler(path, "PATH")
    if zig := _zig():
        return Compiler(str(_wrapper(zig)), "ziglang")
    if there:
        return Compiler(there[0], "PATH")
    raise LamaError(f"tinygrad's CPU device needs a C compiler and there is no clang here; {INSTALL}")


def explain(error: BaseException) -> str | None:
    """One line for a failure of tinygrad's that comes from the compiler or the environment, None for any other."""
    for link in _chain(error):
        if why := _wrong_variable(link):
            return why
        command = link.cmd if isinstance(link, subprocess.CalledProcessError) else None
        failed = isinstance(command, list) and "-c" in command and any(str(word).startswith("--target=") for word in command)
        missing = isinstance(link, OSError) and link.filename is not None and link.filename in ("clang", os.environ.get("CC"))
        no_device = isinstance(link, RuntimeError) and "no usable devices" in str(link)
        if failed or missing or no_device:
            try:
                compiler = find_compiler()
            except LamaError as none:
                return str(none)
            if why := compiler.probe():
                return not_clang(compiler, why)
            if os.environ.get("CC") != compiler.path and not shutil.which("clang"):
                return "tinygrad was used before lama.compiler.ensure_compiler() and found no clang; call that first"
            return (
                "tinygrad could not compile a kernel; run `lama doctor`" if failed else "tinygrad has no usable device; run `lama doctor`"
            )
    return None


def _wrong_variable(error: BaseException) -> str | None:
    """One line if tinygrad raised this as it read a variable of the environment: many when it is imported, others later."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__") != "tinygrad.helpers" or isinstance(error, KeyboardInterrupt):
        return None
    function, known = trace.tb_frame.f_code.co_name, trace.tb_frame.f_locals
    if function == "getenv":
        kind = "a number" if isinstance(known["default"], float) else "a whole number"
        return f"{known['key']} in the environment must be {kind}; got {quoted(os.environ.get(known['key']))}. Correct or unset it"
    if function == "parse":
        return f"DEV or --device must name a device, such as CPU or CUDA; got {quoted(known['s'])}"
    return None


def not_clang(compiler: Compiler, why: str) -> str:
    """The message for a compiler that fails its probe."""
    source = f"CC={compiler.path}" if compiler.kind == "$CC" else compiler.path
    advice = "Unset CC and lama finds a clang itself" if compiler.kind == "$CC" else f"Instead {INSTALL}"
    return f"the C compiler must be a clang that works; got {source} ({compiler.version}): {why}. {advice}"


def cache_folder() -> Path:
    """The folder of lama's own small files, not made here. It can never be made where there is no home folder."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lama"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "lama"
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lama"


def _is_recent(path: str) -> bool:
    """Judged by the name of the file that it stands for, such as /usr/lib/llvm-14/bin/clang: nothing is run."""
    version = re.search(r"(?:clang|llvm)-(\d+)", os.path.realpath(path))
    return version is None or int(version[1]) >= OLDEST


def _newest_clang() -> str | None:
    found: dict[int, str] = {}
    for folder in os.get_exec_path():
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if (match := re.fullmatch(r"clang-(\d+)(\.exe)?", name)) and (path := shutil.which(name, path=folder)):
                found.setdefault(int(match[1]), path)
    return found[max(found)] if found else None


def _zig() -> Path | None:
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (zig := Path(folder) / ("zig.exe" if WINDOWS else "zig")).is_file():
            return zig.absolute()
    return None


def _wrapper_name(zig: Path) -> str:
    return f"clang-zig-{sha256(str(zig).encode()).hexdigest()[:12]}{'.cmd' if WINDOWS else ''}"


def _wrapper(zig: Path) -> Path:
    """The script that runs `zig clang`: in lama's cache folder, else in a temporary folder, else in memory (Linux)."""
    content = os.fsencode(f'@"{zig}" clang %*\r\n' if WINDOWS else f'#!/bin/sh\nexec {shlex.quote(str(zig))} clang "$@"\n')
    for make_folder in (cache_folder, _temporary_folder):
        try:
            script = make_folder() / _wrapper_name(zig)
            if not script.is_file() or script.read_bytes() != content:
                script.parent.mkdir(parents=True, exist_ok=True)
                _write_script(script, content)
            if os.access(script, os.X_OK):  # false on a file system mounted noexec
                return script
        except OSError:
            continue
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("clang", 0)
        os.write(handle, content)
        return Path(f"/proc/{os.getpid()}/fd/{handle}")
    raise LamaError("no folder to put the compiler's script in; set XDG_CACHE_HOME to one that can be written to and run from")


def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="lama-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _write_script(script: Path, content: bytes) -> None:
    """Whole or not at all, also when two processes start at once."""
    handle, name = tempfile.mkstemp(dir=script.parent, prefix=script.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o755)
        os.replace(name, script)
    except BaseException:
        os.unlink(name)
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, then what it was raised from or during."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__
