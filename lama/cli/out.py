"""Check output folders and files before the work begins, so that no other files are overwritten."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lama.cli.live import say
from lama.errors import LamaError, UsageError, abbreviated, note, quoted
from lama.files import quoted_path

SHOWN = 3  # names listed of an occupied folder
SIGNED = 1000  # first bytes of a file, which contain its signature
PNG_HEADER = 33  # bytes before a PNG's second chunk
RUN_FOLDERS = ("checkpoints", "data", "unfinished")  # subfolders that runs and experiments empty
MAKERS = ("train", "bert", "seq2seq", "classify", "experiment")


class Occupied(UsageError):
    """The folder has contents that must not be replaced."""


def check_folder(
    out: Path,
    command: str,
    replace: bool | None = None,
    *,
    older: bool = False,
    what: str = "--out",
) -> None:
    """Check that a folder is empty or new and can be written; changes nothing.

    With `replace`, output of the same command is accepted; None means that the command has no --restart.
    `older` means that a folder without a marker has such output. Raises Occupied for other contents,
    UsageError for a file, LamaError if writing is not allowed.
    """
    from lama.marker import contents, made_by

    shown = quoted_path(out)
    writable = f"{what} must be a folder that can be written; got {shown}"
    try:
        path = Path(os.path.realpath(out))  # a link is followed
        there = _nearest(path)
        if there == path and not path.is_dir():
            raise UsageError(f"{what} must be a folder; got the file {shown}")
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise LamaError(f"{writable}, as {quoted_path(there)} cannot")
        names = contents(path) if there == path else []
    except OSError as error:  # a long name, an unreadable folder, or the current folder was removed
        raise LamaError(f"{writable} ({error.strerror})") from None
    for folder in (path, *path.parents):
        if folder.name in RUN_FOLDERS and (made_by(folder.parent) or "").startswith(MAKERS):
            where = quoted_path(folder)
            raise UsageError(f"{what} must be outside a run's own folders; got {shown}, in {where}")
    if not names:
        return
    writer = made_by(path)
    own = writer == command or (writer is None and older)
    rule = f"{what} must be a new or empty folder; got {shown}"
    if own and replace is None:
        raise Occupied(rule)
    if own and not replace:
        advice = f"Replace it with --restart, or choose another {what}"
        raise Occupied(f"{what} has earlier output of lama {command}, {shown}. {advice}")
    if own:
        return
    things = f"output of lama {quoted(writer, plain=True)}" if writer else "other files"
    raise Occupied(f"{rule}, which has {things}: {abbreviated(names, most=SHOWN)}")


def free_folder(named: Path | None, default: Path, check: Callable[[Path], None]) -> Path:
    """The named folder if `check` accepts it; without a name the default or, if occupied, default-2, ..."""
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
        note(f"{default} is not changed: writing to {out}")
    return out


@contextmanager
def own_folder(
    named: Path | None,
    default: Path | None,
    command: str,
    check: Callable[[Path], None] | None = None,
    *,
    replace: bool | None = None,
    what: str = "--out",
) -> Iterator[Path]:
    """Create, mark and lock the folder that `free_folder` finds; `check` is `check_folder` by default."""
    from lama.marker import claimed

    check = check or partial(check_folder, command=command, replace=replace, what=what)
    out = free_folder(named, default or Path(), check)
    with claimed(out, command):
        check(out)  # a second time: another process may have written there meanwhile
        yield out


def check_file(out: Path, kinds: Sequence[str], command: str) -> str:
    """Check that a file can be written; returns its ending, one of `kinds` such as png.

    An existing file must have the same command's signature. Raises UsageError for another ending, a folder
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
            raise LamaError(f"--out must be in an existing folder that can be written; got {shown}")
        if there and not (path.is_file() and _is_signed(path, kind, command)):
            rule = f"a new file, or one that lama {command} wrote"
            raise UsageError(f"--out must be {rule}; got {shown}. Choose another name")
    except OSError as error:  # a long name
        raise LamaError(f"--out must be a file that can be written; got {shown} ({error.strerror})") from None
    if kind != "html":
        from lama.figures import check_installed

        check_installed("a picture")
    return kind


def write_file(out: Path, content: bytes, what: str, command: str) -> None:
    """Write a signed file atomically, following links, and print `heads.png: 0.1 MB, 4 heat maps`."""
    from lama.atomic import write_atomically

    # A second time: another process may have written there meanwhile.
    kind = check_file(out, [out.suffix.lower().removeprefix(".")], command)
    write_atomically(Path(os.path.realpath(out)), signed(content, kind, command))
    say(f"{out}: {len(content) / 1e6:.1f} MB, {what}")


def signed(content: bytes, kind: str, command: str) -> bytes:
    """Add the command's name to a page or a picture; the bytes are reproducible."""
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
    """The path or its nearest existing parent. Raises OSError for a long name."""
    for each in (path, *path.parents):
        try:
            os.lstat(each)
            return each
        except (FileNotFoundError, NotADirectoryError):
            pass
    raise FileNotFoundError
