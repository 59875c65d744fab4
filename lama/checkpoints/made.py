"""The marker of a folder, lama.json: names the command that made the folder, and is its lock while a command works there."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lama import __version__
from lama.checkpoints.atomic import LEFTOVER, clean, made, unwritable
from lama.errors import LamaError, note
from lama.files import field, quoted_path, read_object

MARKER = "lama.json"


def made_by(folder: Path) -> str | None:
    """The command that made a folder, such as `train`; None where no marker says so."""
    try:
        return field(read_object(folder / MARKER), "made_by", str, MARKER)
    except LamaError:
        return None


def contents(folder: Path) -> list[str]:
    """The names in a folder, without lama's marker and, beside that, what killed processes left half-written. Raises OSError."""
    names = sorted(os.listdir(folder))
    if made_by(folder) is None and _size(folder / MARKER) != 0:
        return names
    return [name for name in names if name != MARKER and not LEFTOVER.fullmatch(name)]


@contextmanager
def claimed(folder: Path, command: str) -> Iterator[None]:
    """No other process may be in such a block for the same folder, which is made and marked where it is new or empty.

    What is still empty in the end is gone again, if it was made here. Raises LamaError if another process is at work there,
    and if the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(made(folder))
            marker = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            stack.callback(os.close, marker)
            _lock(marker, folder)
            stack.callback(_unmark, folder)
            if not contents(folder):
                os.truncate(marker, 0)
                os.write(marker, json.dumps({"made_by": command, "version": __version__}).encode() + b"\n")
            if made_by(folder) is not None:
                clean(folder)
        except OSError as error:
            raise unwritable(folder, error) from error
        yield


def _lock(file: int, folder: Path) -> None:
    """Raises LamaError if another process has the lock; where nothing can be locked, only says so."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(file), os.stat(folder / MARKER))  # or else the other has just removed it
    except (BlockingIOError, FileNotFoundError):
        alone = False
    except (ImportError, OSError) as error:
        note(f"{quoted_path(folder)} cannot be locked ({error}): let no other command write there until this one ends")
        return
    if not alone:
        raise LamaError(f"another process is working in {quoted_path(folder)}. Wait until it ends, or choose another folder")


def _unmark(folder: Path) -> None:
    """Remove a marker beside which there is nothing, and one that was only the lock."""
    with suppress(OSError):
        if _size(folder / MARKER) == 0 or (made_by(folder) is not None and os.listdir(folder) == [MARKER]):
            (folder / MARKER).unlink()


def _size(file: Path) -> int:
    return os.lstat(file).st_size if os.path.lexists(file) else -1
