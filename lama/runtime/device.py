"""Choosing the tinygrad device, and opening it quickly if it is a CPU."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from lama.errors import LamaError, UsageError, first_line, quoted
from lama.runtime.buffers import use_large_pages
from lama.runtime.compiler import ensure_compiler, explain
from lama.runtime.opening import is_loadable, quick_opening
from lama.runtime.release import is_tested
from lama.timing import timed

FASTER = ("METAL", "AMD", "NV", "CUDA")
"""tinygrad's devices that are known to be faster than lama's kernels on the CPU."""
_reason = "named by DEV"
STORAGE = ("DISK", "NPY", "TINYFS")  # tinygrad's devices that only hold files and arrays


def open_device() -> None:
    """Find a compiler and open the default device, before the first tensor. Raises LamaError."""
    from tinygrad import Device

    def choose() -> str:
        choose_device()
        return Device.DEFAULT

    with timed("opening the device"):
        _open(choose)


def choose_device() -> None:
    """Set the default device if the user named none: the first of `FASTER` that opens here, else the CPU.

    tinygrad itself may also choose an OpenCL device, which may be the CPU or an integrated GPU. It asks the
    drivers of every kind of GPU in turn: half a second if there is none. A choice that tinygrad has already
    made stays, since tensors may be on that device.
    """
    from tinygrad import Device
    from tinygrad.helpers import DEV

    global _reason
    if any(map(repr, DEV.value)):
        return
    if os.environ.get("DEV"):  # tinygrad notes its choice there
        _reason = "tinygrad's choice, for a tensor made before lama's first"
        return
    if any(
        os.environ.get(name) == "1"
        for name in (*FASTER, "QCOM", "CL", "DSP", "WEBGPU", "NULL", "PYTHON", "CPU")
    ):
        return  # tinygrad warns that this form is deprecated
    chosen, _reason = "CPU", f"no {', '.join(FASTER[:-1])} or {FASTER[-1]} device was found"
    for name in FASTER if _signs_of_faster() else ():
        with contextlib.suppress(Exception):
            Device[name]
            chosen, _reason = name, "known to be faster than the CPU"
            break
    DEV.value = os.environ["DEV"] = chosen  # in the environment, as tinygrad does it, for child processes


def device_reason() -> str:
    """The reason for the choice of the default device, in words for the user."""
    return _reason


def _signs_of_faster() -> bool:
    """Whether there may be one of `FASTER`: macOS, device files, PCI and USB vendors, NVIDIA's library."""

    def holds(file: Path, values: tuple[str, ...]) -> bool:
        try:
            return file.read_text().strip() in values
        except OSError:
            return False

    return (
        sys.platform == "darwin"
        or bool(os.environ.get("REMOTE"))
        or any(map(os.path.exists, ("/dev/kfd", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")))
        or any(holds(file, ("0x1002", "0x10de")) for file in Path("/sys/bus/pci/devices").glob("*/vendor"))
        or any(holds(file, ("add1", "3801")) for file in Path("/sys/bus/usb/devices").glob("*/idVendor"))
        or is_loadable("libcuda.so.1")
    )


def use_device(name: str) -> None:
    """Make `name` (such as CPU, CUDA, METAL) tinygrad's default device from now on. Raises UsageError."""
    from tinygrad import Device
    from tinygrad.helpers import DEV

    def choose() -> str:
        DEV.value = name
        return Device.DEFAULT

    global _reason
    previous = list(DEV.value)
    try:
        _open(choose, quoted(name))
        _reason = "named by --device"
    except LamaError:
        DEV.value = previous
        raise


def check_device(name: object) -> None:
    """Open the device of this name, such as CPU or CUDA:1, if it is not None. Raises UsageError."""
    if name is not None:
        if not isinstance(name, str):
            raise UsageError(f"device must be a text such as CPU; got {quoted(name)}")
        _open(lambda: name, quoted(name))


def _open(choose: Callable[[], str], asked: str | None = None) -> None:
    """Find a compiler and open the device that `choose` returns.

    Raises LamaError if the compiler or the environment is the cause, else UsageError that names `asked`
    (default: DEV).
    """
    from tinygrad import Context, Device
    from tinygrad.helpers import DEV

    if is_tested():
        from lama.runtime.kernel_cache import guard_cache

        guard_cache()
    try:
        name = choose()
        ensure_compiler()
        if name.split(":")[0].upper() in STORAGE:
            raise ValueError("it only stores data")
        with quick_opening(name):
            Device[name]
        use_large_pages(Device.canonicalize(name))
    except LamaError:
        raise
    except Exception as error:
        if why := explain(error):
            raise LamaError(why) from error
        asked = asked or f"DEV={DEV}"
        with Context(DEV=""):
            here = ", ".join(Device.get_available_devices()) or "none"
        why = "unknown" if isinstance(error, ModuleNotFoundError) else first_line(error)
        raise UsageError(
            f"device must be one that tinygrad can open here ({here}); got {asked} ({why})"
        ) from error


def use_devices(text: str) -> tuple[str, ...]:
    """Open several devices; the first becomes the default.

    `2` gives ("CPU", "CPU:1"), the default device's first two; `CUDA:0,CUDA:1` gives ("CUDA", "CUDA:1").
    Raises UsageError for devices that tinygrad cannot open here.
    """
    from tinygrad import Device

    words = [word.strip() for word in text.split(",")]
    if text.isdecimal():
        if not 1 <= int(text) <= 64:
            raise UsageError(
                f"devices must be a number from 1 to 64, or names such as CPU:0,CPU:1; got {text}"
            )
        open_device()
        words = [f"{Device.DEFAULT}:{i}" for i in range(int(text))]
    names = tuple(Device.canonicalize(word) for word in words if word)
    if not names or len(set(names)) < len(words):
        raise UsageError(f"devices must be a number, or names such as CPU:0,CPU:1, each once; got {text!r}")
    if ":" in names[0]:
        raise UsageError(
            f"devices must begin with the first of their kind, {names[0].split(':')[0]}; got {text!r}"
        )
    use_device(names[0])
    for name in names[1:]:
        check_device(name)
    return names
