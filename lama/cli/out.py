"""What `--out` names: looked at before the work begins, written when all of it is there."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lama.errors import LamaError, UsageError

SHOWN = 3  # of the names that are in the way


def check_folder(out: Path, own: Sequence[str], what: str) -> None:
    """Refuse a folder that holds other things than `what`, or that cannot be written or made; changes nothing.

    It is new, or empty, or one of the files `own`, which nothing but `what` has, is in it. Raises UsageError for a file and
    for a folder of other things, naming them, LamaError where writing is not allowed.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out must be a folder; got the file {out}")
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise LamaError(f"--out must be a folder that can be written; got {out}, as {there} cannot")
        names = sorted(path.name for path in out.iterdir()) if there == out else []
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise LamaError(f"--out must be a folder that can be written; got {out} ({error.strerror})") from None
    if names and not set(own) & set(names):
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UsageError(
            f"--out must be a new folder or one with {what} in it; got {out}, which holds other things: {', '.join(names[:SHOWN])}{more}"
        )


def check_file(out: Path, kinds: Sequence[str]) -> str:
    """The ending of a file that can be written, one of `kinds` such as png; changes nothing.

    Raises UsageError for another ending and for a folder, LamaError where writing is not allowed.
    """
    kind = out.suffix.lower().removeprefix(".")
    if kind not in kinds:
        raise UsageError(f"--out must end in {' or '.join(f'.{each}' for each in kinds)}; got {out}")
    try:
        if out.is_dir():
            raise UsageError(f"--out must be a file; got the folder {out}")
        if not out.parent.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
            raise LamaError(f"--out must be in a folder that is there and can be written; got {out}")
    except OSError as error:  # a name that is too long
        raise LamaError(f"--out must be a file that can be written; got {out} ({error.strerror})") from None
    return kind


def write_file(out: Path, content: bytes, what: str) -> None:
    """Write all of it or nothing, and say so on standard error: `heads.png: 0.1 MB, 4 heat maps`."""
    from lama.checkpoints.atomic import atomic_write

    with atomic_write(out) as file:
        file.write(content)
    print(f"{out}: {len(content) / 1e6:.1f} MB, {what}", file=sys.stderr)
