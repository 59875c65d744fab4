"""Files of JSON lines that grow during a run: its log and its recording."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lama.atomic import write_atomically
from lama.errors import LamaError
from lama.files import parse_json_lines, quoted_path, read_file

Record = dict[str, Any]


def append_line(file: Path, record: Mapping[str, object]) -> None:
    """Append a line. Raises LamaError if it cannot be written."""
    try:
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(json.dumps(record) + "\n")
    except OSError as error:
        raise LamaError(f"{quoted_path(file)} cannot be written: {error.strerror or error}") from error


def write_lines(file: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Replace a file. Raises LamaError if it cannot be written."""
    write_atomically(file, "".join(f"{json.dumps(record)}\n" for record in records).encode())


def read_lines(file: Path, most: int) -> list[Record]:
    """The lines of a file of at most `most` bytes, but not an incomplete last one. Raises LamaError."""
    *lines, _ = read_file(file, most).split(b"\n")
    return parse_json_lines(lines, quoted_path(file))
