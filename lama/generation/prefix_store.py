"""A store of prefixes on disk: keys and values of texts, kept for the next start of the server."""

import hashlib
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lama.atomic import atomic_write, clean
from lama.errors import LamaError, first_line, warn
from lama.files import quoted_path
from lama.generation.decoder import Runner
from lama.shapes import Array

LEAST = 64  # tokens; a shorter prefix is not worth a file
AT_ONCE = 4  # prefixes that may wait to be written; more are dropped
ENDING = ".safetensors"


@dataclass
class _Entry:
    path: Path
    tokens: Array


class PrefixStore:
    """A folder of prefixes, of at most `most` bytes; the least recently used are removed first.

    A file holds the tokens, (n,) int32, and the cache's rows, (2 · n_layers, n_kv_heads, n, d_head), with
    the SHA-256 of both. Its folder is named by `Runner.digest`. One process at a time may write.
    """

    def __init__(self, folder: Path, runner: Runner, most: int):
        """Raises LamaError for a folder that cannot be written."""
        self.folder, self.runner, self.most = folder, runner, most
        self._here = folder / runner.digest()
        try:
            self._here.mkdir(parents=True, exist_ok=True)
            clean(self._here)
        except OSError as error:
            rule = "the folder of --cache-dir must be writable"
            raise LamaError(f"{rule}; got {quoted_path(folder)} ({error.strerror})") from error
        # Oldest first.
        found = [self._read_tokens(path) for path in sorted(self._here.glob(f"*{ENDING}"), key=_age)]
        self._entries = [entry for entry in found if entry is not None]
        self._queue: queue.Queue[tuple[Array, Array] | None] = queue.Queue(AT_ONCE)
        self._lock = threading.Lock()
        self._writer = threading.Thread(target=self._write_all, name="prefixes", daemon=True)
        self._writer.start()

    def longest(self, tokens: Array) -> tuple[int, "_Entry | None"]:
        """The length of the longest prefix of a text, without its last token, in any file; that file."""
        with self._lock:
            lengths = [common(entry.tokens, tokens[:-1]) for entry in self._entries]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        return (0, None) if best is None else (lengths[best], self._entries[best])

    def load(self, entry: "_Entry", n: int) -> Array | None:
        """The cache's rows of the first n tokens, (2 · n_layers, n_kv_heads, n, d_head).

        None for a damaged file, which is removed with a warning.
        """
        from safetensors import safe_open

        try:
            with safe_open(entry.path, "numpy") as file:
                rows, digest = file.get_tensor("cache"), (file.metadata() or {}).get("sha256")
            if rows.shape != self.runner.shape_of_prefix(len(entry.tokens)) or digest != _digest(
                entry.tokens, rows
            ):
                raise ValueError("its content is not what was written")
            entry.path.touch()
        except Exception as error:  # safetensors raises errors of its own
            self._drop(entry, first_line(error))
            return None
        return rows[:, :, :n]

    def lacks(self, tokens: Array) -> bool:
        """Whether a text is long enough for a file, and no file has it."""
        return len(tokens) >= LEAST and self.longest(np.append(tokens, 0))[0] < len(tokens)

    def keep(self, tokens: Array, rows: Array, wait: bool = False) -> None:
        """Queue a prefix to be written. If the queue is full, it is dropped, unless told to `wait`."""
        with suppress(queue.Full):
            self._queue.put((tokens.copy(), rows), block=wait)

    def close(self) -> None:
        """Wait until everything is written."""
        self._queue.put(None)
        self._writer.join()

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except (LamaError, OSError) as error:
                warn(f"a prefix could not be kept: {first_line(error)}")

    def _write(self, tokens: Array, rows: Array) -> None:
        from safetensors.numpy import save

        rows = np.ascontiguousarray(rows)
        if rows.nbytes > self.most:
            return
        for entry in list(self._entries):
            if common(entry.tokens, tokens) == len(entry.tokens):  # the beginning of this one
                self._remove(entry)
        self._make_room(rows.nbytes)
        path = self._here / f"{hashlib.sha256(tokens.tobytes()).hexdigest()[:32]}{ENDING}"
        with atomic_write(path) as file:
            file.write(save({"tokens": tokens, "cache": rows}, {"sha256": _digest(tokens, rows)}))
        with self._lock:
            self._entries.append(_Entry(path, tokens))

    def _make_room(self, n: int) -> None:
        """Remove the least recently used files, also those of other models, for n more bytes."""
        paths = sorted(self.folder.glob(f"*/*{ENDING}"), key=_age)
        sizes = {path: path.stat().st_size for path in paths}
        total, own = sum(sizes.values()) + n, {entry.path: entry for entry in self._entries}
        for path in paths:
            if total <= self.most:
                break
            total -= sizes[path]
            if path in own:
                self._remove(own[path])
            else:
                path.unlink(missing_ok=True)

    def _read_tokens(self, path: Path) -> _Entry | None:
        from safetensors import safe_open

        try:
            with safe_open(path, "numpy") as file:
                tokens = file.get_tensor("tokens")
            if tokens.dtype != np.int32 or tokens.ndim != 1 or len(tokens) >= self.runner.context:
                raise ValueError("its tokens are not what was written")
            return _Entry(path, tokens)
        except Exception as error:  # safetensors raises errors of its own
            warn(f"removed a damaged file of prefixes, {quoted_path(path)}: {first_line(error)}")
            with suppress(OSError):
                path.unlink()
            return None

    def _drop(self, entry: _Entry, why: str) -> None:
        warn(f"removed a damaged file of prefixes, {quoted_path(entry.path)}: {why}")
        self._remove(entry)

    def _remove(self, entry: _Entry) -> None:
        with self._lock:
            self._entries = [each for each in self._entries if each is not entry]
        with suppress(OSError):
            entry.path.unlink()


def common(a: Array, b: Array) -> int:
    """The number of first tokens that two texts have in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def _digest(tokens: Array, rows: Array) -> str:
    found = hashlib.sha256(tokens.tobytes())
    found.update(np.ascontiguousarray(rows).view(np.uint8).data)
    return found.hexdigest()
