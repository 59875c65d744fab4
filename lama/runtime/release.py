"""The releases of tinygrad that lama was tested with; on others it uses none of tinygrad's internals."""

import functools
import importlib.util
import os
import re

from lama.errors import note

TESTED = ("0.14.0",)


@functools.cache
def installed() -> str:
    """The installed release of tinygrad.

    It is in the name of the .dist-info folder, if there is one: importing importlib.metadata takes 12 ms.
    """
    spec = importlib.util.find_spec("tinygrad")
    folder = os.path.dirname(os.path.dirname(spec.origin)) if spec and spec.origin else os.curdir
    names = [re.fullmatch(r"tinygrad-(\d[\w.]*)\.dist-info", name) for name in os.listdir(folder)]
    found = [name[1] for name in names if name]
    if len(found) == 1:
        return found[0]
    from importlib.metadata import version

    return version("tinygrad")


@functools.cache
def is_tested() -> bool:
    """Whether the installed release is one of `TESTED`. Prints a note once if it is not."""
    if installed() in TESTED:
        return True
    tested = ", ".join(TESTED)
    note(
        f"tinygrad {installed()} is not a release that lama was tested with ({tested}): "
        "running without lama's own kernels, which is slower"
    )
    return False
