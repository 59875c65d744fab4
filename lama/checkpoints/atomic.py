"""Writing a file so that a reader finds the old one or the new one, never half of one."""

import os
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
