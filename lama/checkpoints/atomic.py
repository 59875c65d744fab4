"""Writing a file, or a model's folder, so that a reader finds the old one or the new one, never half of one."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from lama.errors import LamaError
from lama.files import quoted_path

# Temporary names: of this version, then of earlier ones.
LEFTOVER = re.compile(r"\.lama-[0-9a-f]{12}|\.(saving|data|step-\d+)-\d+|\..+\.\d+\.tmp")


def temporary(folder: Path) -> Path:
    """A name in `folder` that nothing has, and that no file of the user's will have."""
    return folder / f".lama-{secrets.token_hex(6)}"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends well; after an error the old file is still there.

    A link of that name is replaced, not followed. Raises LamaError if the disk is full or the folder cannot be written.
    """
    place = temporary(path.parent)
    try:
        with open(place, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(place, path)
    except OSError as error:
        reason = error.strerror or error
        raise LamaError(f"{quoted_path(path)} must be writable; got {reason}. Nothing was changed there") from error
    finally:
        place.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A place for a model's files, which take their names in `folder` when the block ends well, config.json last.

    After an error all is as it was: a folder that had to be made is gone again. Raises LamaError if it cannot be written.
    """
    place = temporary(folder)
    try:
        with made(folder):
            try:
                place.mkdir()
                with naming(place, folder):
                    yield place
                for path in sorted(place.iterdir(), key=lambda path: (path.name == "config.json", path)):
                    _move(path, folder / path.name)
            finally:
                remove(place)
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, where they are missing; the new ones are gone in the end if they are empty.

    Raises OSError.
    """
    folder = Path(os.path.realpath(folder))
    new = list(takewhile(lambda each: not os.path.lexists(each), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def naming(place: Path, folder: Path) -> Iterator[None]:
    """Make errors name `folder`, which the user knows, for a temporary `place`."""
    try:
        yield
    except LamaError as error:
        if str(place) not in str(error):
            raise
        raise type(error)(str(error).replace(str(place), str(folder))) from error


def unwritable(folder: Path, error: OSError) -> LamaError:
    return LamaError(f"{quoted_path(folder)} must be a folder that can be written; got {error.strerror or error}")


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it. What a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder of lama's. No other process may be writing there."""
    if folder.is_dir():
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                remove(path)


def _move(source: Path, target: Path) -> None:
    """Take `target`'s place; a folder replaces a folder, unless that is the same already: the two cannot change places at once."""
    if source.is_dir() and target.is_dir():
        if _content(source) == _content(target):
            return
        os.rename(target, temporary(source.parent))
    os.replace(source, target)


def _content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
