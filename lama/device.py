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


def use_devices(text: str) -> tuple[str, ...]:
    """`2` -> ("CPU", "CPU:1"), the default device's first two; `CUDA:0,CUDA:1` -> ("CUDA", "CUDA:1"), the first now the default.

    Raises UsageError for devices that tinygrad cannot open here.
    """
    from tinygrad import Device

    words = [word.strip() for word in text.split(",")]
    if text.isdecimal():
        if not 1 <= int(text) <= 64:
            raise UsageError(f"devices must be a number from 1 to 64, or names such as CPU:0,CPU:1; got {text}")
        words = [f"{Device.DEFAULT}:{i}" for i in range(int(text))]
    names = tuple(Device.canonicalize(word) for word in words if word)
    if not names or len(set(names)) < len(words):
        raise UsageError(f"devices must be a number, or names such as CPU:0,CPU:1, each once; got {text!r}")
    if ":" in names[0]:
        raise UsageError(f"devices must begin with the first of their kind, {names[0].split(':')[0]}; got {text!r}")
    use_device(names[0])
    for name in names[1:]:
        try:
            Device[name]
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"devices must be such as tinygrad can open here; got {name!r} ({reason})") from error
    return names
