"""tinygrad's cache of compiled kernels, an SQLite file. If it fails, a note is printed and work continues."""

import functools
import multiprocessing
import os
import sqlite3
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import tinygrad.helpers

from lama.errors import first_line, note
from lama.files import quoted_path
from lama.host import cache_folder, cpu_model

WAIT = 5  # seconds for another process that writes
ADVICE = "Set CACHEDB to a file in a folder that can be written"
helpers: Any = tinygrad.helpers


def guard_cache() -> None:
    """Make tinygrad use a `Cache`, in this process and in those that compile for it."""
    from tinygrad.engine import worker

    if not isinstance(helpers._db_connection, Cache):
        helpers._db_connection, worker._init_worker = Cache(), _start_worker
        helpers._db_tables.clear()


def _start_worker() -> None:
    from tinygrad.engine import worker

    start = worker._init_worker  # tinygrad's own: in a new process it is not replaced yet
    guard_cache()
    start()


def is_used() -> bool:
    """Whether tinygrad keeps compiled kernels at all (CACHELEVEL)."""
    return bool(helpers.CACHELEVEL >= 1)


def database() -> str:
    """The path of the cache. Raises OSError for a relative one where the current folder was removed."""
    return os.path.abspath(os.environ.get("CACHEDB") or cache_folder().parent / "tinygrad" / "cache.db")


class Cache:
    """A stand-in for tinygrad's connection to its cache."""

    def __init__(self) -> None:
        self._file: Any = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave_to_parent)

    def _leave_to_parent(self) -> None:
        """Open a new connection when needed: after a fork, SQLite's may be neither used nor closed."""
        self._parents, self._file = self._file, None

    def cursor(self) -> "Cursor":
        return Cursor(self)

    def commit(self) -> None:
        self.attempt(sqlite3.Connection.commit)

    def attempt(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """The result of `work`, which is tried twice; None if both tries fail."""
        for _ in range(2):
            try:
                self._file = self._file or _open(database())
                return work(self._file)
            except (OSError, sqlite3.Error) as error:
                # A cursor of a file that was replaced since.
                if isinstance(error, sqlite3.ProgrammingError) or "no such table" in str(error):
                    break
                self._recover(error)
        return None

    def _recover(self, error: Exception) -> None:
        """Rename a damaged file, so that the next try begins a new one; after other errors, use memory."""
        if self._file is not None:
            with suppress(sqlite3.Error):
                self._file.close()  # other processes may write again
        self._file, path = None, "CACHEDB"
        helpers._db_tables.clear()
        try:
            path = database()
            # Damage raises DatabaseError itself, not a subclass. Files of another name may not be tinygrad's.
            if type(error) is sqlite3.DatabaseError and path.endswith(".db") and os.path.isfile(path):
                _set_aside(path)
                return
        except OSError as another:
            error = another
        why = getattr(error, "strerror", None) or first_line(error)
        lost = "they are lost when this run ends"
        _say(f"cannot save compiled kernels in {quoted_path(path)} ({why}): {lost}. {ADVICE}")
        self._file = sqlite3.connect(":memory:", check_same_thread=False)


class Cursor:
    """A stand-in for tinygrad's cursor, which returns no row if a query fails or a checksum is wrong."""

    def __init__(self, cache: Cache):
        self._cache = cache
        self._rows: Any = None
        self._key: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def close(self) -> None:
        """Do nothing: no cursor stays open."""

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> "Cursor":
        self._key = values
        if sql.startswith("REPLACE"):
            self._key, pickled = values[:-1], values[-1]
            values = (*self._key, pickled + _checksum(self._key, pickled))
        self._rows = self._cache.attempt(lambda file: file.execute(sql, values))
        return self

    def fetchone(self) -> Any:
        row = self._cache.attempt(lambda _: self._rows and self._rows.fetchone())
        stored = row[0] if row else None
        return row if isinstance(stored, bytes) and stored[-8:] == _checksum(self._key, stored[:-8]) else None


def _open(path: str) -> sqlite3.Connection:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = sqlite3.connect(path, timeout=WAIT, isolation_level="IMMEDIATE", check_same_thread=False)
    file.text_factory = lambda text: text.decode(errors="replace")
    with suppress(sqlite3.OperationalError):  # another process is doing the same
        file.execute("PRAGMA journal_mode=WAL")
    file.execute("PRAGMA synchronous=NORMAL")
    return file


def _set_aside(path: str) -> None:
    aside = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(path + end, aside + end)
    _say(f"the cache of compiled kernels was damaged; it is now {quoted_path(aside)}, and a new one is made")


def _checksum(key: tuple[Any, ...], pickled: bytes) -> bytes:
    """Eight bytes that follow a key's pickled value; tinygrad, which reads to the pickle's end, ignores them.

    They depend on the compiler and on the processor, since machines with different processors may share a
    home folder.
    """
    made_by = repr((key, _identity(os.environ.get("CC", "")), cpu_model())).encode(errors="replace")
    return b"lama" + zlib.crc32(pickled, zlib.crc32(made_by)).to_bytes(4, "little")


@functools.cache
def _identity(compiler: str) -> tuple[str | int, ...]:
    """The compiler's path, size and modification time: another compiler makes other kernels."""
    try:
        found = os.stat(compiler)
    except OSError:
        return (compiler,)
    return compiler, found.st_size, found.st_mtime_ns


def _say(message: str) -> None:
    if multiprocessing.parent_process() is None:  # once, not in every process that compiles
        note(message)
