"""The C compiler that tinygrad's CPU device needs: found, or taken from the PyPI package ziglang.

tinygrad runs `$CC` (default `clang`) as one executable and needs clang's vector types. A machine with only
Python has none; ziglang's wheel has a complete clang as `zig clang`, which a two-line script in the user's
cache folder turns into one executable. Tested on Linux x86-64; the macOS and Windows branches (a `.cmd`
script) are untested.
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
from lama.host import cache_folder, cores
from lama.runtime.release import is_tested

WINDOWS = sys.platform == "win32"
INSTALL = "pip install ziglang, or install clang, or set CC to a clang"
OLDEST = 17  # the first clang that compiles tinygrad's casts of bfloat16 on x86
# The features that tinygrad's kernels and lama's own need.
PROBE = """typedef float float4 __attribute__((aligned(16),ext_vector_type(4)));
float4 most(float4 x, _Float16 y) {
  return __builtin_elementwise_max(x, __builtin_elementwise_floor(x + (float)y));
}
"""


@dataclass(frozen=True)
class Compiler:
    """A compiler that was found. Only `version` and `probe` run it."""

    path: str
    """The executable that tinygrad will run."""
    kind: str
    """Its source: `$CC`, `PATH` or `ziglang`."""

    @cached_property
    def version(self) -> str:
        """The first line of `--version`, or the reason why there is none."""
        command = [self.path, "--version"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"unknown ({error})"
        return next(iter((done.stdout or done.stderr).splitlines()), "unknown")

    def probe(self) -> str | None:
        """None if it compiles the sources that tinygrad writes, else one line that says why not."""
        machine = platform.machine().lower()
        arch = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
        options = f"-c -x c -O2 -ffreestanding -nostdlib --target={arch}-none-unknown-elf - -o -"
        command = [self.path, *options.split()]
        try:
            done = subprocess.run(command, input=PROBE.encode(), capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"it does not run ({error})"
        if done.returncode == 0 and done.stdout.startswith(b"\x7fELF"):
            return None
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        status = f"exit status {done.returncode}, {len(done.stdout)} bytes of output"
        return next((line for line in lines if "error" in line), status)


def ensure_compiler() -> None:
    """Set `os.environ["CC"]`, before the first kernel, so that tinygrad's CPU device finds a compiler.

    Nothing is run. Without a compiler it does nothing if the default device is not the CPU; else it raises
    LamaError that says what to install.
    """
    try:
        compiler = find_compiler()
    except LamaError:
        if needs_compiler():
            raise
        return
    os.environ["CC"] = compiler.path
    compile_here()
    # tinygrad caches variables that it has read; if it already read another CC, it has to read it again.
    if (helpers := sys.modules.get("tinygrad.helpers")) and helpers.getenv("CC", "clang") != compiler.path:
        helpers.getenv.cache_clear()


def compile_here() -> None:
    """Compile in this process on up to four cores, unless PARALLEL is set: workers cost more than they save.

    Measured on two cores, the first training step of transformer.py: 11 to 13 s, with workers 16 to 28 s.
    """
    if "PARALLEL" in os.environ or cores() > 4:
        return
    os.environ["PARALLEL"] = "0"
    if (helpers := sys.modules.get("tinygrad.helpers")) and is_tested():
        helpers.PARALLEL.value = 0


def asked_threads(given: str | None = None) -> int | None:
    """The requested number of threads: `given`, else LAMA_THREADS; None if neither is set.

    Raises UsageError unless it is from 1 to 64, or to 4 for each core if that is more.
    """
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
    """Whether the default device compiles with clang. Opens devices; for use without a compiler."""
    from tinygrad import Device
    from tinygrad.helpers import DEV

    from lama.runtime.device import choose_device

    choose_device()  # else tinygrad chooses, and keeps its choice
    try:
        return str(Device.DEFAULT).split(":")[0] == "CPU" and DEV.renderer in ("", "CLANG")
    except RuntimeError:  # no usable devices
        return True


def find_compiler() -> Compiler:
    """`$CC` if set, else clang (then the newest clang-NN) on PATH, else ziglang's.

    A clang on PATH whose name says it is older than OLDEST comes last. Raises LamaError if there is none.
    """
    if given := os.environ.get("CC"):
        if not (path := shutil.which(given)):
            advice = "Correct it, or unset it and lama finds a clang itself"
            raise LamaError(f"CC must name one executable, a clang; got CC={given}. {advice}")
        zig, path = _zig(), os.path.abspath(path)
        return Compiler(path, "ziglang" if zig and Path(path).name == _wrapper_name(zig) else "$CC")
    there = [os.path.abspath(path) for path in (shutil.which("clang"), _newest_clang()) if path]
    if path := next(filter(_is_recent, there), None):
        return Compiler(path, "PATH")
    if zig := _zig():
        return Compiler(str(_wrapper(zig)), "ziglang")
    if there:
        return Compiler(there[0], "PATH")
    raise LamaError(f"tinygrad's CPU device needs a C compiler, and no clang was found; {INSTALL}")


def explain(error: BaseException) -> str | None:
    """One line for a tinygrad error that the compiler or the environment caused, else None."""
    for link in _chain(error):
        if why := _wrong_variable(link):
            return why
        command = link.cmd if isinstance(link, subprocess.CalledProcessError) else None
        words = [str(word) for word in command] if isinstance(command, list) else []
        failed = "-c" in words and any(word.startswith("--target=") for word in words)
        file = link.filename if isinstance(link, OSError) else None
        missing = file is not None and file in ("clang", os.environ.get("CC"))
        no_device = isinstance(link, RuntimeError) and "no usable devices" in str(link)
        if failed or missing or no_device:
            try:
                compiler = find_compiler()
            except LamaError as none:
                return str(none)
            if why := compiler.probe():
                return not_clang(compiler, why)
            if os.environ.get("CC") != compiler.path and not shutil.which("clang"):
                function = "lama.runtime.compiler.ensure_compiler()"
                return f"tinygrad was used before {function} and found no clang; call that first"
            what = "could not compile a kernel" if failed else "has no usable device"
            return f"tinygrad {what}; run `lama doctor`"
    return None


def _wrong_variable(error: BaseException) -> str | None:
    """One line if tinygrad raised this error while it read an environment variable, else None."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, KeyboardInterrupt):
        return None
    if trace.tb_frame.f_globals.get("__name__") != "tinygrad.helpers":
        return None
    function, known = trace.tb_frame.f_code.co_name, trace.tb_frame.f_locals
    if function == "getenv":
        kind = "a number" if isinstance(known["default"], float) else "a whole number"
        name, value = known["key"], quoted(os.environ.get(known["key"]))
        return f"{name} in the environment must be {kind}; got {value}. Correct or unset it"
    if function == "parse":
        return f"DEV or --device must name a device, such as CPU or CUDA; got {quoted(known['s'])}"
    return None


def not_clang(compiler: Compiler, why: str) -> str:
    """The message for a compiler that fails its probe."""
    source = f"CC={compiler.path}" if compiler.kind == "$CC" else compiler.path
    advice = "Unset CC and lama finds a clang itself" if compiler.kind == "$CC" else f"Instead {INSTALL}"
    return f"the C compiler must be a clang that works; got {source} ({compiler.version}): {why}. {advice}"


def _is_recent(path: str) -> bool:
    """Whether the name of its file, such as /usr/lib/llvm-14/bin/clang, gives no version below OLDEST."""
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
            match = re.fullmatch(r"clang-(\d+)(\.exe)?", name)
            if match and (path := shutil.which(name, path=folder)):
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
    """The script for `zig clang`: in lama's cache folder, else a temporary folder, else in memory (Linux)."""
    unix = f'#!/bin/sh\nexec {shlex.quote(str(zig))} clang "$@"\n'
    content = os.fsencode(f'@"{zig}" clang %*\r\n' if WINDOWS else unix)
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
    advice = "set XDG_CACHE_HOME to one that can be written to and run from"
    raise LamaError(f"no folder to put the compiler's script in; {advice}")


def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="lama-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _write_script(script: Path, content: bytes) -> None:
    """Write it whole or not at all, even when two processes start at the same time."""
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
    """An exception, then those that it was raised from or during."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__
