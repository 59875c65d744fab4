"""Rows of JSON lines and Parquet files, and files compressed with gzip or zstd."""

import gzip
import importlib
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import PurePath
from typing import Any, BinaryIO

from lama.errors import LamaError, first_line, quoted
from lama.files import checked, parse_json, quoted_path

ROWS = {".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
"""The kinds of files of rows, by their suffix; other files are text."""
COMPRESSED = (".gz", ".zst")
LONGEST = 64 << 20  # bytes of a line
LARGEST_GROUP = 1 << 30  # bytes of a row group of Parquet, which is read at once
PARSED_TOGETHER = 1 << 18  # bytes of lines that are parsed together, which is faster

Row = dict[str, object]


def kind_of_file(name: str) -> str:
    """The kind of a file by its name: text, lines or parquet."""
    path = PurePath(name)
    return ROWS.get(PurePath(path.stem if path.suffix in COMPRESSED else path).suffix.lower(), "text")


def open_decompressed(name: str) -> AbstractContextManager[BinaryIO]:
    """Open a file, to be read decompressed. Raises OSError, and LamaError if zstandard is missing."""
    if name.endswith(".gz"):
        return gzip.open(name, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        new_frame = needed("zstandard").ZstdDecompressor().decompressobj
        return io.BufferedReader(_Zstandard(open(name, "rb"), new_frame), 1 << 16)
    return open(name, "rb")


class _Zstandard(io.RawIOBase):
    """The content of a zstd file. Few compressed bytes are read at a time: each may expand to 32 kB."""

    def __init__(self, file: BinaryIO, new_frame: Callable[[], Any]):
        self._file, self._new_frame = file, new_frame
        self._frame: Any = None
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._compressed or self._file.read(1024)
            if self._frame is None or self._frame.eof:
                if not compressed:
                    return 0
                self._frame = self._new_frame()
            elif not compressed:
                raise EOFError("the file is cut short")
            self._ready = memoryview(self._frame.decompress(compressed))
            self._compressed = self._frame.unused_data
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def needed(package: str) -> Any:
    """A package of the extra `data`. Raises LamaError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise LamaError(f"{package} is not installed. Run: pip install {package.partition('.')[0]}") from None


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Raise LamaError for a file that cannot be read or decompressed."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise LamaError(f"the corpus {quoted_path(name)} cannot be read: {reason}") from None
    except Exception as error:
        if type(error).__name__ not in ("ZstdError", "ArrowInvalid", "ArrowNotImplementedError"):
            raise
        raise LamaError(f"the corpus {quoted_path(name)} cannot be read: {first_line(error)}") from None


def rows_of(
    name: str, open_: Callable[[], AbstractContextManager[Any]], columns: Sequence[str]
) -> Iterator[tuple[int, Row]]:
    """The rows of a file with their numbers from 1; from Parquet, only those of `columns` that exist.

    Raises LamaError that names file and line.
    """
    with reading(name):
        if kind_of_file(name) == "parquet":
            yield from enumerate(_parquet_rows(name, columns), 1)
            return
        with open_() as file:
            yield from _json_rows(file, quoted_path(name))


def _json_rows(file: Any, source: str) -> Iterator[tuple[int, Row]]:
    done, more = 0, True
    while more:
        lines: list[bytes] = []
        size = 0
        while size < PARSED_TOGETHER and (more := bool(line := file.readline(LONGEST + 1))):
            if len(line) > LONGEST:
                got = f"got more in line {done + len(lines) + 1} of {source}"
                raise LamaError(f"a line must have at most {LONGEST:,} bytes; {got}")
            lines.append(line)
            size += len(line)
        for number, row in enumerate(_parsed(lines, done, source), done + 1):
            if row is not None:
                yield number, row
        done += len(lines)


def _parsed(lines: Sequence[bytes], done: int, source: str) -> list[Row | None]:
    """The object of each line; None for an empty one."""
    full = [line for line in lines if not line.isspace()]
    try:
        found = parse_json(b"[" + b",".join(full) + b"]", source)
        if isinstance(found, list) and len(found) == len(full) and all(type(row) is dict for row in found):
            values = iter(found)
            return [None if line.isspace() else next(values) for line in lines]  # type: ignore[misc]
    except LamaError:
        pass  # parsed one by one below, to name the line
    rows: list[Row | None] = []
    for number, line in enumerate(lines, done + 1):
        where = f"line {number} of {source}"
        line = line.removeprefix(b"\xef\xbb\xbf")
        rows.append(None if not line.strip() else checked(parse_json(line, where), dict, where))
    return rows


def _parquet_rows(name: str, columns: Sequence[str]) -> Iterator[Row]:
    file = needed("pyarrow.parquet").ParquetFile(name, memory_map=True)
    with file:
        for i in range(file.num_row_groups):
            if (size := file.metadata.row_group(i).total_byte_size) > LARGEST_GROUP:
                rule = f"row groups must have at most {LARGEST_GROUP:,} bytes"
                raise LamaError(f"{rule}; got {size:,} in {quoted_path(name)}")
        there = [column for column in columns if column in file.schema_arrow.names]
        if not there:
            got = quoted(", ".join(file.schema_arrow.names), plain=True)
            raise LamaError(f"{quoted_path(name)} must have a column {' or '.join(columns)}; got {got}")
        for batch in file.iter_batches(1000, columns=there):
            yield from batch.to_pylist()
