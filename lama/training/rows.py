"""Rows of texts in a run's folder: pairs or labelled texts, for training and for evaluation."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lama.atomic import write_atomically
from lama.errors import LamaError, quoted
from lama.files import checked, field, parse_json, quoted_path, read_file

FILE = "rows.json"
LARGEST = 4 << 30  # bytes
Row = tuple[str, str]


@dataclass(frozen=True)
class Rows:
    """Two parts of a data set, and the SHA-256 of the file that holds them."""

    train: list[Row]
    held_out: list[Row]
    digest: str


def write_rows(folder: Path, train: Sequence[Row], held_out: Sequence[Row]) -> Rows:
    """Write both parts into `folder`, which must exist. Raises LamaError."""
    write_atomically(folder / FILE, json.dumps({"train": train, "held_out": held_out}).encode())
    return read_rows(folder)


def read_rows(folder: Path) -> Rows:
    """Read what `write_rows` wrote. Raises LamaError for anything else."""
    path = folder / FILE
    content, source = read_file(path, LARGEST), quoted_path(path)
    parts = checked(parse_json(content, source), dict, source)
    train, held_out = (_rows(field(parts, part, list, source), source) for part in ("train", "held_out"))
    return Rows(train, held_out, hashlib.sha256(content).hexdigest())


def _rows(part: list[object], source: str) -> list[Row]:
    rows = []
    for row in part:
        match row:
            case [str(first), str(second)]:
                rows.append((first, second))
            case _:
                raise LamaError(f"{source} must hold rows of two texts; got {quoted(row)}")
    return rows
