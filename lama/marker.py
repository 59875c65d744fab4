"""lama.json, the marker of a folder: it names the command that wrote the folder, and locks the folder."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lama import __version__
from lama.atomic import LEFTOVER, clean, created, unwritable
from lama.errors import LamaError, note
from lama.files import field, quoted_path, read_object

MARKER = "lama.json"


def made_by(folder: Path) -> str | None:
    """The command that wrote a folder, such as `train`; None without a marker."""
    try:
        return field(read_object(folder / MARKER), "made_by", str, MARKER)
    except LamaError:
        return None


def contents(folder: Path) -> list[str]:
    """The names in a folder, except lama's marker and the incomplete files beside it. Raises OSError."""
    names = sorted(os.listdir(folder))
    if made_by(folder) is None and _size(folder / MARKER) != 0:
        return names
    return [name for name in names if name != MARKER and not LEFTOVER.fullmatch(name)]


@contextmanager
def claimed(folder: Path, command: str) -> Iterator[None]:
    """Lock a folder for this process; create and mark it if it is new or empty.

    New folders that are still empty at the end are removed. Raises LamaError if another process has the lock
    or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(created(folder))
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
    """Lock, or print a note where that is impossible. Raises LamaError if another process has the lock."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # False if the other process has just removed the file.
        alone = os.path.samestat(os.fstat(file), os.stat(folder / MARKER))
    except (BlockingIOError, FileNotFoundError):
        alone = False
    except (ImportError, OSError) as error:
        advice = "let no other command write there until this one ends"
        note(f"{quoted_path(folder)} cannot be locked ({error}): {advice}")
        return
    if not alone:
        advice = "Wait until it ends, or choose another folder"
        raise LamaError(f"another process is working in {quoted_path(folder)}. {advice}")


def _unmark(folder: Path) -> None:
    """Remove a marker without other files beside it, and one that was only the lock."""
    with suppress(OSError):
        if _size(folder / MARKER) == 0 or (made_by(folder) is not None and os.listdir(folder) == [MARKER]):
            (folder / MARKER).unlink()


def _size(file: Path) -> int:
    return os.lstat(file).st_size if os.path.lexists(file) else -1
