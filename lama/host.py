"""Facts about this computer that do not depend on tinygrad: its processor, its memory, its cache folder."""

import functools
import os
import platform
import sys
import threading
from pathlib import Path

LEAST_STACK = 2_000_000  # bytes of a thread that runs AMX: the panels of a product take up to 786 kB


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_model() -> str:
    """The processor's name and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def stack_bytes() -> int:
    """The smallest stack of a thread that runs kernels: the main one, or one that `threading` starts."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    sizes = [sys.maxsize if limit == resource.RLIM_INFINITY else limit, threading.stack_size()]
    return min(size for size in sizes if size)  # 0 is the default: the limit, or 2 MiB without one


@functools.cache
def may_use_amx() -> bool:
    """Whether the processor has AMX and the system lets this process use it; asks the system first.

    Linux saves those large registers only for a process that asked, and for its children. False also where a
    thread's stack, which holds the panels of an AMX product, is smaller than LEAST_STACK.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or stack_bytes() < LEAST_STACK:
        return False
    import ctypes

    arch_prctl, ask, tiles = 158, 0x1023, 18
    try:
        return bool(ctypes.CDLL(None).syscall(arch_prctl, ask, tiles) == 0)
    except (AttributeError, OSError):
        return False


def memory_bytes() -> int:
    """The machine's memory, or 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def free_bytes() -> int:
    """The memory that is free or can be freed, else the machine's memory, or 0 if unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        return memory_bytes()


def resident_bytes() -> int:
    """The memory that this process holds, or 0 if unknown."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, LookupError, AttributeError):
        return 0


def cache_folder() -> Path:
    """The folder for lama's own small files. It may not exist yet; without a home folder it never can."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lama"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "lama"
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lama"
