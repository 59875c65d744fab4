"""Atomic writes: a reader finds the old version of a file or model folder or the new one, never a mixture."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from lama.errors import LamaError
from lama.files import quoted_path

LAST = ("config.json", "meta.json", "adapter_config.json")  # moved last: a folder with one is complete
# Temporary names: of this version, then of earlier ones.
LEFTOVER = re.compile(r"\.lama-[0-9a-f]{12}|\.(saving|data|step-\d+)-\d+|\..+\.\d+\.tmp")


def temporary(folder: Path) -> Path:
    """An unused name in `folder` that no file of the user will have."""
    return folder / f".lama-{secrets.token_hex(6)}"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets the name `path` when the block ends. After an error the old file is unchanged.

    A link of that name is replaced, not followed. Raises LamaError if the file cannot be written.
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
        raise LamaError(f"{quoted_path(path)} cannot be written: {reason}. Nothing was changed") from error
    finally:
        place.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as `atomic_write` does. Raises LamaError."""
    with atomic_write(path) as file:
        file.write(content)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a folder, each atomically. Raises LamaError."""
    for name, content in files.items():
        write_atomically(folder / name, content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends, config.json or meta.json last.

    After an error nothing has changed, and a new folder is removed. Raises LamaError if it cannot be written.
    """
    place = temporary(folder)
    try:
        with created(folder):
            try:
                place.mkdir()
                with naming(place, folder):
                    yield place
                for path in sorted(place.iterdir(), key=lambda path: (path.name in LAST, path)):
                    _move(path, folder / path.name)
            finally:
                remove(place)
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """Create a folder and its parents; remove new ones that are still empty at the end. Raises OSError."""
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
    """Replace the path of a temporary `place` in error messages by that of `folder`, which the user knows."""
    try:
        yield
    except LamaError as error:
        if str(place) not in str(error):
            raise
        raise type(error)(str(error).replace(str(place), str(folder))) from error


def unwritable(folder: Path, error: OSError) -> LamaError:
    return LamaError(f"the folder {quoted_path(folder)} cannot be written: {error.strerror or error}")


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove the incomplete files of killed processes. No other process may be writing in the folder."""
    if folder.is_dir():
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                remove(path)


def _move(source: Path, target: Path) -> None:
    """Rename to `target`. A folder with the same content stays: a rename cannot replace a folder at once."""
    if source.is_dir() and target.is_dir():
        if _content(source) == _content(target):
            return
        os.rename(target, temporary(source.parent))
    os.replace(source, target)


def _content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
