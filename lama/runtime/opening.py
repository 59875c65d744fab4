"""Opening tinygrad's CPU device half a second faster, without work that is not needed here."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

from lama.runtime.internals import diskcache_get, diskcache_put
from lama.runtime.release import installed, is_tested

TABLE = "lama_cpu_helpers"  # in tinygrad's cache
LATER = {"tinygrad.renderer.nir": "LVPRenderer", "tinygrad.renderer.isa.x86": "X86Renderer"}
"""Renderers that the device imports and uses only if DEV names them: 80 ms."""
LIBRARIES = {"libc": "libc.so.6", "m": "libm.so.6", "rt": "libgcc_s.so.1"}
"""The file names of tinygrad's libraries for the loader of glibc."""


@contextmanager
def quick_opening(device: str) -> Iterator[None]:
    """Make a CPU device open quickly in the block; other devices are not affected.

    The system's loader finds the libraries, instead of a search of folders (50 ms). The four helper programs
    come from tinygrad's cache (0.35 s). Renderers of `LATER` are imported when they are used.
    """
    if not is_tested() or device.split(":")[0].upper() != "CPU":
        yield
        return
    from tinygrad.runtime.support import c

    library: Any = c.DLL
    find = library.findlib

    def find_quickly(name: str, paths: Sequence[str], extra_paths: Sequence[str] = ()) -> str | None:
        if name in LIBRARIES and f"{name.upper()}_PATH" not in os.environ and is_loadable(LIBRARIES[name]):
            return LIBRARIES[name]
        found: str | None = find(name, paths, extra_paths)
        return found

    later = {name: _stand_in(name, LATER[name]) for name in LATER.keys() - sys.modules.keys()}
    library.findlib = staticmethod(find_quickly)
    sys.modules.update(later)
    try:
        from tinygrad.runtime import ops_cpu
    finally:
        library.findlib = staticmethod(find)
        for name in later:
            del sys.modules[name]
    module: Any = ops_cpu
    lower = module.do_to_program

    def kept(sink: Any, renderer: Any) -> Any:
        key = f"{sink.arg.name} {renderer.target!r} {installed()}"
        elf = diskcache_get(TABLE, key) or diskcache_put(TABLE, key, lower(sink, renderer).to_elf())
        return SimpleNamespace(to_elf=lambda: elf)

    module.do_to_program = kept
    try:
        yield
    finally:
        module.do_to_program = lower


def is_loadable(library: str) -> bool:
    """Whether the system's loader finds a library, which is then loaded."""
    with suppress(OSError):
        ctypes.CDLL(library)
        return True
    return False


def _stand_in(module: str, renderer: str) -> ModuleType:
    """A module with a class that imports the real one and makes its instances."""
    found = ModuleType(module)

    def new(cls: type, *arguments: Any) -> Any:
        return getattr(import_module(module), renderer)(*arguments)

    setattr(found, renderer, type(renderer, (), {"__new__": new}))
    return found
