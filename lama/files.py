"""Small files from elsewhere, which are not trusted: JSON and TOML within limits, and their values by type.

Every JSON and TOML file that lama reads goes through here, so that a damaged or hostile one gives one clear line.
"""

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lama.errors import LamaError, quoted

LARGEST = 64 << 20  # bytes; the largest tokenizer.json in use has 33 MB, and what is parsed takes up to 30 times as much
DEEPEST = 100  # lists and objects inside one another
DIGITS = 40  # of a whole number; transformers writes 10^30, 31 digits, for a length without limit
LARGEST_TEXT = 1 << 30  # bytes of a file of a person's own texts
AGAIN = "Download or copy it again"

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half of a character
_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
_REQUIRED = object()


def read_file(path: Path, most: int = LARGEST) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises LamaError: a pipe or a device could be without an end."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise LamaError(f"{quoted_path(path)} must be a regular file; got a {_kind(state.st_mode)}")
            if state.st_size > most:
                raise LamaError(f"{quoted_path(path)} must have at most {most:,} bytes; got {state.st_size:,}. {AGAIN}")
            return file.read(min(max(state.st_size, 1 << 16), most) + 1)  # a file of /proc has no size
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise LamaError(f"{quoted_path(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file, its line ends as they are. Raises LamaError as `read_file` does, and for other bytes."""
    try:
        return read_file(path, most).decode()
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x} at offset {error.start}"
        raise LamaError(f"{quoted_path(path)} must be readable UTF-8 text; got byte {byte}. Convert it first") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises LamaError as `read_file` and `parse_json` do."""
    return parse_json(read_file(path), quoted_path(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises LamaError as `read_json` does, and for another value."""
    return checked(read_json(path), dict, quoted_path(path))


def parse_json(content: bytes, source: object) -> Any:
    """The value of a JSON text: valid Unicode, finite numbers, at most `DEEPEST` levels and `DIGITS` digits.

    `source` names the text in messages. Raises LamaError.
    """
    try:
        value = json.loads(content, parse_int=_integer, parse_float=_number, parse_constant=_number)
        check_depth(value)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{error.object[error.start]:02x} at offset {error.start}, which is not UTF-8"
    except UnicodeEncodeError as error:
        wrong = f"half of a character, {error.object[error.start]!r}"
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        wrong = f"over {DEEPEST} levels of lists and objects"
    except ValueError as error:
        wrong = str(error)
    raise LamaError(f"{source} must be valid JSON; got {wrong}. {AGAIN}")


def parse_json_lines(lines: Iterable[bytes], source: object) -> list[dict[str, Any]]:
    """The objects of JSON lines, one a line. Raises LamaError as `parse_json` does, and for other values."""
    lines = list(lines)
    found = parse_json(b"[" + b",\n".join(lines) + b"]", source)  # all at once, which is twice as fast
    if len(found) != len(lines):  # a line with several, or one over several lines
        raise LamaError(f"{source} must have one object a line; got {len(found):,} in {len(lines):,} lines. {AGAIN}")
    return [checked(value, dict, f"line {n} of {source}") for n, value in enumerate(found, 1)]


def parse_toml(text: str, source: object) -> dict[str, Any]:
    """The table of a TOML text, under the same limits as `parse_json`. Raises LamaError."""
    try:
        value = tomllib.loads(text, parse_float=_number)
        check_depth(value)
        return value
    except RecursionError:
        wrong = f"over {DEEPEST} levels of lists and tables"
    except ValueError as error:
        wrong = quoted(error, plain=True)
    raise LamaError(f"{source} must be valid TOML; got: {wrong}")


def field(fields: Mapping[str, Any], key: str, kind: type, source: object, default: Any = _REQUIRED) -> Any:
    """The value of `key`, of this type; `default`, where there is one, for a key that is missing or null. Raises LamaError.

    A float may be written as a whole number; true and false are no numbers.
    """
    value = fields.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if key not in fields:
        raise LamaError(f"{source} must have {key}; got {quoted(', '.join(map(str, fields)) or 'nothing', plain=True)}")
    return checked(value, kind, f"{key} in {source}")


def checked(value: Any, kind: type, what: object) -> Any:
    """The value, if it is of this JSON type. Raises LamaError that names it `what`."""
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            pass
    if type(value) is not kind:
        raise LamaError(f"{what} must be {_NAMES[kind]}; got {quoted(value)}")
    return value


def check_depth(value: Any) -> None:
    """Raises RecursionError for lists and objects over `DEEPEST` levels deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        if not containers:
            return
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
    raise RecursionError


def quoted_path(path: object) -> str:
    """A path in a message, cut in the middle where it is longer than a screen's line or two."""
    text = str(path)
    text = text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
    return text if text.isprintable() else repr(text)[1:-1]


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}, which is not finite")
    return value


def _kind(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
