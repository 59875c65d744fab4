"""Places to write, checked before the work begins, so that nothing is lost that a person or another command made."""

import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lama.errors import LamaError, UsageError, note, quoted
from lama.files import quoted_path

SHOWN = 3  # of the names that are in the way
SIGNED = 1000  # bytes at the beginning of a file, in which its signature stands
PNG_HEADER = 33  # bytes before a PNG's second chunk
RUN_FOLDERS = ("checkpoints", "data", "unfinished")  # in the folders of runs and experiments, which empty them


class Occupied(UsageError):
    """A folder holds something that must not be replaced."""


def check_folder(
    out: Path, command: str, replace: bool | None = None, *, older: Callable[[Path], bool] = lambda folder: False, what: str = "--out"
) -> None:
    """Refuse a folder that holds anything, or that cannot be written or made; changes nothing.

    With `replace`, what the same command made is accepted: its marker says so, or, where it has none, `older`, which
    recognises what earlier versions made. None means that the command has no --restart to ask for it.
    Raises Occupied for a folder with something else in it, UsageError for a file, LamaError where writing is not allowed.
    """
    from lama.checkpoints.made import contents, made_by

    shown = quoted_path(out)
    try:
        path = Path(os.path.realpath(out))  # a link is followed
        there = _nearest(path)
        if there == path and not path.is_dir():
            raise UsageError(f"{what} must be a folder; got the file {shown}")
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise LamaError(f"{what} must be a folder that can be written; got {shown}, as {quoted_path(there)} cannot")
        names = contents(path) if there == path else []
    except OSError as error:  # a name that is too long, a folder that may not be read, a current folder that is gone
        raise LamaError(f"{what} must be a folder that can be written; got {shown} ({error.strerror})") from None
    for folder in (path, *path.parents):
        if folder.name in RUN_FOLDERS and (made_by(folder.parent) or "").startswith(("train", "experiment")):
            raise UsageError(f"{what} must be outside a run's own folders; got {shown}, in {quoted_path(folder)}")
    if not names:
        return
    maker = made_by(path)
    own = maker == command or (maker is None and older(path))
    if own and replace:
        return
    if own:
        raise Occupied(
            f"{what} must be a new or empty folder; got {shown}"
            if replace is None
            else f"{what} holds what lama {command} wrote before, {shown}. Replace it with --restart, or choose another {what}"
        )
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    things = f"what lama {quoted(maker, plain=True)} wrote" if maker else "other things"
    listed = quoted(", ".join(names[:SHOWN]), plain=True)
    raise Occupied(f"{what} must be a new folder or an empty one; got {shown}, which holds {things}: {listed}{more}")


def free_folder(named: Path | None, default: Path, check: Callable[[Path], None]) -> Path:
    """The folder that was named, which `check` must accept; else the default or, where that is occupied, default-2, ..., with a note."""
    out, n = named or default, 1
    while True:
        try:
            check(out)
            break
        except Occupied:
            if named:
                raise
            n += 1
            out = default.with_name(f"{default.name}-{n}")
    if n > 1:
        note(f"{default} stays as it is: writing to {out}")
    return out


@contextmanager
def own_folder(
    named: Path | None, default: Path | None, command: str, check: Callable[[Path], None] | None = None, **options: Any
) -> Iterator[Path]:
    """The folder to write, as `free_folder` finds it: made, marked, and in use by no other process.

    `check` is `check_folder` with `options` where it is not given.
    """
    from lama.checkpoints.made import claimed

    def checked(folder: Path) -> None:
        check(folder) if check else check_folder(folder, command, **options)

    out = free_folder(named, default or Path(), checked)
    with claimed(out, command):
        checked(out)  # again: another process may have been there in between
        yield out


def check_file(out: Path, kinds: Sequence[str], command: str) -> str:
    """The ending of a file that can be written, one of `kinds` such as png; changes nothing.

    A file that is there must be one of the same command, by its signature. Raises UsageError for another ending, a folder
    and any other file, LamaError where writing is not allowed and for a picture without matplotlib.
    """
    kind, shown = out.suffix.lower().removeprefix("."), quoted_path(out)
    if kind not in kinds:
        raise UsageError(f"--out must end in {' or '.join(f'.{each}' for each in kinds)}; got {shown}")
    try:
        path = Path(os.path.realpath(out))  # a link is followed
        there = _nearest(path) == path
        if path.is_dir():
            raise UsageError(f"--out must be a file; got the folder {shown}")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise LamaError(f"--out must be in a folder that is there and can be written; got {shown}")
        if there and not (path.is_file() and _is_signed(path, kind, command)):
            raise UsageError(f"--out must be a new file, or one that lama {command} wrote; got {shown}. Choose another name")
    except OSError as error:  # a name that is too long
        raise LamaError(f"--out must be a file that can be written; got {shown} ({error.strerror})") from None
    if kind != "html":
        from lama.figures import check_installed

        check_installed("a picture")
    return kind


def write_file(out: Path, content: bytes, what: str, command: str) -> None:
    """Write all of it, signed, or nothing, and say so on standard error: `heads.png: 0.1 MB, 4 heat maps`. A link is followed."""
    from lama.checkpoints.atomic import atomic_write

    kind = check_file(out, [out.suffix.lower().removeprefix(".")], command)  # again: the work took its time
    with atomic_write(Path(os.path.realpath(out))) as file:
        file.write(signed(content, kind, command))
    print(f"{out}: {len(content) / 1e6:.1f} MB, {what}", file=sys.stderr)


def signed(content: bytes, kind: str, command: str) -> bytes:
    """A page or a picture in which it says what command it is from: the same bytes each time."""
    place = PNG_HEADER if kind == "png" else content.index(b"<meta" if kind == "html" else b"<svg")
    return content[:place] + _signature(kind, command) + content[place:]


def _signature(kind: str, command: str) -> bytes:
    name = f"lama {command}".encode()
    if kind == "png":
        chunk = b"tEXtSoftware\0" + name
        return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b'<meta name="generator" content="%b">\n' % name if kind == "html" else b"<!-- %b -->\n" % name


def _is_signed(path: Path, kind: str, command: str) -> bool:
    with open(path, "rb") as file:
        return _signature(kind, command) in file.read(SIGNED)


def _nearest(path: Path) -> Path:
    """The path, or the first folder above it that is there. Raises OSError for a name that is too long."""
    for each in (path, *path.parents):
        try:
            os.lstat(each)
            return each
        except (FileNotFoundError, NotADirectoryError):
            pass
    raise FileNotFoundError
