"""Writing a file, or a model's folder, so that a reader finds the old one or the new one, never half of one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lama.errors import LamaError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends well; after an error the old file is still there.

    Raises LamaError if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise LamaError(f"{path} must be writable; got {error.strerror or error}. Nothing was changed there") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A place for a model's files, which take their names in `folder` when the block ends well: config.json last, since with it the
    folder is a model. After an error what was there is still there.

    Raises LamaError if the folder cannot be written.
    """
    temporary = folder / f".saving-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == "config.json", path)):
            _move(path, folder / path.name)
    except OSError as error:
        raise LamaError(f"{folder} must be a folder that can be written; got {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Take `target`'s place; a folder replaces a folder, unless that is the same already: the two cannot change places at once."""
    if source.is_dir() and target.is_dir():
        if _content(source) == _content(target):
            return
        os.rename(target, source.with_name(f".old-{target.name}"))
    os.replace(source, target)


def _content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
