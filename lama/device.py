"""Choosing the tinygrad device, and opening it without what a CPU has no need of."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lama.compiler import ensure_compiler, explain
from lama.errors import LamaError, UsageError, first_line, quoted

TABLE = "lama_cpu_helpers"  # in tinygrad's cache
STORAGE = ("DISK", "NPY", "TINYFS")  # devices of tinygrad's that hold files and arrays


def open_device() -> None:
    """Make sure of a compiler and open tinygrad's default device, once, before the first tensor. Raises LamaError."""
    from tinygrad import Device
    from tinygrad.helpers import DEV

    choose_device()
    _open(lambda: Device.DEFAULT, f"DEV={DEV}")  # without one, tinygrad chooses


def choose_device() -> None:
    """The CPU, where nothing here looks like another device; else tinygrad's choice.

    tinygrad asks the drivers of every kind of GPU in turn, which takes half a second where there is none of them.
    """
    from tinygrad.helpers import DEV

    if sys.platform == "linux" and not os.environ.get("DEV") and not any(map(repr, DEV.value)) and not _signs_of_others():
        DEV.value = os.environ["DEV"] = "CPU"  # the environment too, as tinygrad does it, for processes that it starts


def _signs_of_others() -> bool:
    """Whether a device other than the CPU may be here: device files, AMD's and NVIDIA's PCI devices, GPUs on USB, libraries."""
    from tinygrad.runtime.support.c import DLL

    def holds(file: Path, values: tuple[str, ...]) -> bool:
        try:
            return file.read_text().strip() in values
        except OSError:
            return False

    files = ("/dev/kfd", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kgsl-3d0")
    return (
        bool(os.environ.get("REMOTE"))
        or any(
            os.environ.get(name) == "1" for name in ("METAL", "AMD", "NV", "CUDA", "QCOM", "CL", "DSP", "WEBGPU", "NULL", "PYTHON", "CPU")
        )
        or any(map(os.path.exists, files))
        or any(holds(file, ("0x1002", "0x10de")) for file in Path("/sys/bus/pci/devices").glob("*/vendor"))
        or any(holds(file, ("add1", "3801")) for file in Path("/sys/bus/usb/devices").glob("*/idVendor"))
        or any(DLL.findlib(name, [file]) for name, file in (("cuda", "cuda"), ("opencl", "OpenCL")))
    )


@contextmanager
def _kept_helpers() -> Iterator[None]:
    """Within it, what tinygrad's CPU device lowers when it is opened, four small programs for HCQ2, comes from its cache: 0.35 s."""
    from tinygrad.helpers import diskcache_get, diskcache_put
    from tinygrad.runtime import ops_cpu

    lower = ops_cpu.do_to_program

    def kept(sink: Any, renderer: Any) -> Any:
        key = f"{sink.arg.name} {renderer.target!r} {version('tinygrad')}"
        elf = diskcache_get(TABLE, key) or diskcache_put(TABLE, key, lower(sink, renderer).to_elf())
        return SimpleNamespace(to_elf=lambda: elf)

    ops_cpu.do_to_program = kept
    try:
        yield
    finally:
        ops_cpu.do_to_program = lower


def use_device(name: str) -> None:
    """Make `name` (such as CPU, CUDA, METAL) tinygrad's default device from here on. Raises UsageError."""
    from tinygrad import Device
    from tinygrad.helpers import DEV

    def choose() -> str:
        DEV.value = name
        return Device.DEFAULT

    previous = list(DEV.value)
    try:
        _open(choose, quoted(name))
    except LamaError:
        DEV.value = previous
        raise


def check_device(name: object) -> None:
    """Open the device of this name, such as CPU or CUDA:1; nothing for None. Raises UsageError."""
    if name is not None:
        if not isinstance(name, str):
            raise UsageError(f"device must be a text such as CPU; got {quoted(name)}")
        _open(lambda: name, quoted(name))


def _open(choose: Callable[[], str], asked: str) -> None:
    """Open the device that `choose` returns, where a compiler is ready for it. Raises LamaError, and UsageError that names `asked`."""
    from tinygrad import Context, Device

    from lama.kernel_cache import guard_cache

    guard_cache()
    try:
        name = choose()
        ensure_compiler()
        if name.split(":")[0].upper() in STORAGE:
            raise ValueError("it stores and does not compute")
        with _kept_helpers():
            Device[name]
    except LamaError:
        raise
    except Exception as error:
        if why := explain(error):
            raise LamaError(why) from error
        with Context(DEV=""):
            here = ", ".join(Device.get_available_devices()) or "none"
        why = "unknown" if isinstance(error, ModuleNotFoundError) else first_line(error)
        raise UsageError(f"device must be one that tinygrad can open here ({here}); got {asked} ({why})") from error


def use_devices(text: str) -> tuple[str, ...]:
    """`2` -> ("CPU", "CPU:1"), the default device's first two; `CUDA:0,CUDA:1` -> ("CUDA", "CUDA:1"), the first now the default.

    Raises UsageError for devices that tinygrad cannot open here.
    """
    from tinygrad import Device

    words = [word.strip() for word in text.split(",")]
    if text.isdecimal():
        if not 1 <= int(text) <= 64:
            raise UsageError(f"devices must be a number from 1 to 64, or names such as CPU:0,CPU:1; got {text}")
        open_device()
        words = [f"{Device.DEFAULT}:{i}" for i in range(int(text))]
    names = tuple(Device.canonicalize(word) for word in words if word)
    if not names or len(set(names)) < len(words):
        raise UsageError(f"devices must be a number, or names such as CPU:0,CPU:1, each once; got {text!r}")
    if ":" in names[0]:
        raise UsageError(f"devices must begin with the first of their kind, {names[0].split(':')[0]}; got {text!r}")
    use_device(names[0])
    for name in names[1:]:
        check_device(name)
    return names
