"""Small files that are not trusted: JSON and TOML within limits, and their values by type.

lama reads every JSON and TOML file here: a damaged or hostile one gives one clear error.
"""

import contextlib
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TypeAlias, TypeVar, overload

from lama.errors import LamaError, quoted

Json: TypeAlias = str | int | float | list[object] | dict[str, object] | None
T = TypeVar("T")
Default = TypeVar("Default")

# Bytes; the largest tokenizer.json in use has 33 MB, and a parsed file takes up to 30 times as much.
LARGEST = 64 << 20
DEEPEST = 100  # nesting of lists and objects
DIGITS = 40  # of an integer; transformers writes 10^30, 31 digits, for a length without limit
LARGEST_TEXT = 1 << 30  # bytes of a user's text file
AGAIN = "Download or copy it again"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a character
_NAMES: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_REQUIRED = object()


def read_file(path: Path, most: int = LARGEST) -> bytes:
    """Read a regular file of at most `most` bytes. Raises LamaError, also for pipes and devices."""
    where = quoted_path(path)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise LamaError(f"{where} must be a regular file; got a {_kind(state.st_mode)}")
            if state.st_size > most:
                raise LamaError(f"{where} must have at most {most:,} bytes; got {state.st_size:,}. {AGAIN}")
            return file.read(min(max(state.st_size, 1 << 16), most) + 1)  # a file in /proc has no size
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise LamaError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file without changing its line ends. Raises LamaError as `read_file`, or if not UTF-8."""
    try:
        return read_file(path, LARGEST_TEXT).decode()
    except UnicodeDecodeError as error:
        got = f"got byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise LamaError(f"{quoted_path(path)} must be readable UTF-8 text; {got}. Convert it first") from None


def read_json(path: Path) -> Json:
    """The value in a JSON file. Raises LamaError as `read_file` and `parse_json` do."""
    return parse_json(read_file(path), quoted_path(path))


def read_object(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises LamaError as `read_json` does, or for another value."""
    return checked(read_json(path), dict, quoted_path(path))


def parse_json(content: bytes, source: object, advice: str = AGAIN) -> Json:
    """Parse JSON: valid Unicode, finite numbers, at most `DEEPEST` levels and `DIGITS` digits.

    `source` names the text in error messages, `advice` ends them. Raises LamaError.
    """
    try:
        text = content.decode(json.detect_encoding(content))  # json.loads accepts halves of characters
        value: Json = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)
        check_depth(value)
        if _SURROGATE.search(text):
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
    raise LamaError(f"{source} must be valid JSON; got {wrong}. {advice}")


def parse_json_lines(lines: Iterable[bytes], source: object) -> list[dict[str, object]]:
    """Parse JSON lines, one object each. Raises LamaError as `parse_json` does, and for other values."""
    lines = list(lines)
    # All at once, which is twice as fast.
    found = checked(parse_json(b"[" + b",\n".join(lines) + b"]", source), list, source)
    if len(found) != len(lines):  # a line with several objects, or an object over several lines
        got = f"got {len(found):,} in {len(lines):,} lines"
        raise LamaError(f"{source} must have one object a line; {got}. {AGAIN}")
    return [checked(value, dict, f"line {n} of {source}") for n, value in enumerate(found, 1)]


def parse_toml(text: str, source: object) -> dict[str, object]:
    """Parse a TOML table under the same limits as `parse_json`. Raises LamaError."""
    try:
        value: dict[str, object] = tomllib.loads(text, parse_float=_number)
        check_depth(value)
        return value
    except RecursionError:
        wrong = f"over {DEEPEST} levels of lists and tables"
    except ValueError as error:
        wrong = quoted(error, plain=True)
    raise LamaError(f"{source} must be valid TOML; got: {wrong}")


@overload
def field(fields: Mapping[str, object], key: str, kind: type[T], source: object) -> T: ...
@overload
def field(
    fields: Mapping[str, object], key: str, kind: type[T], source: object, default: Default
) -> T | Default: ...
def field(
    fields: Mapping[str, object], key: str, kind: type[T], source: object, default: object = _REQUIRED
) -> object:
    """The value of `key`, of type `kind`. Raises LamaError.

    A `default` replaces a missing or null value. A float may be written as an integer; a bool is no number.
    """
    value = fields.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if key not in fields:
        got = quoted(", ".join(map(str, fields)) or "nothing", plain=True)
        raise LamaError(f"{source} must have {key}; got {got}")
    return checked(value, kind, f"{key} in {source}")


def checked(value: object, kind: type[T], what: object) -> T:
    """The value, if it has this JSON type. Raises LamaError that names it `what`."""
    converted = value
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            converted = float(value)
    if isinstance(converted, kind) and type(converted) is kind:
        return converted
    raise LamaError(f"{what} must be {_NAMES[kind]}; got {quoted(value)}")


def check_depth(value: object) -> None:
    """Raise RecursionError for lists and objects nested more than `DEEPEST` levels deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        if not containers:
            return
        parts = [each.values() if isinstance(each, dict) else each for each in containers]
        level = list(chain.from_iterable(parts))
    raise RecursionError


def quoted_path(path: object) -> str:
    """A path for a message, shortened in the middle if it is long."""
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
