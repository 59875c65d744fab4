"""The releases of tinygrad that lama was tested with: on others it does without tinygrad's internals."""

import functools
from importlib.metadata import version

from lama.errors import note

TESTED = ("0.14.0",)


@functools.cache
def is_tested() -> bool:
    """Whether the installed release is one of `TESTED`. Says once where it is not."""
    installed = version("tinygrad")
    if installed in TESTED:
        return True
    tested = ", ".join(TESTED)
    note(
        f"tinygrad {installed} is not a release that lama was tested with ({tested}): "
        "running without lama's own kernels, which is slower"
    )
    return False
