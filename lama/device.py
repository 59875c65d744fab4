"""Choosing the tinygrad device."""

from lama.errors import UsageError


def use_device(name: str) -> None:
    """Make `name` (such as CPU, CUDA, METAL) tinygrad's default device from here on. Raises UsageError."""
    from tinygrad import Device
    from tinygrad.helpers import DEV

    from lama.compiler import ensure_compiler

    previous = list(DEV.value)
    try:
        DEV.value = name
        ensure_compiler()
        Device[Device.DEFAULT]
    except Exception as error:
        DEV.value = previous
        here = ", ".join(Device.get_available_devices())
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"device must be one that tinygrad can open here ({here}); got {name!r} ({reason})") from error
