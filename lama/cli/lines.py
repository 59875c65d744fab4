"""Lines of standard input, for the commands that answer each of them."""

import sys
from collections.abc import Iterable, Iterator

from lama.errors import LamaError, UsageError


def input_lines() -> Iterator[str]:
    """The lines of standard input without their ends. Raises LamaError where it is closed, or not UTF-8."""
    if sys.stdin is None:
        raise UsageError("standard input must be open for -; got none. Give the text itself")
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise LamaError(f"standard input must be UTF-8 text; got byte 0x{error.object[error.start]:02x}") from error


def in_batches(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """`size` lines at a time, the last time maybe fewer."""
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def at_once(most: int) -> int:
    """How many lines of standard input to answer at a time: each for itself where a person types."""
    return 1 if sys.stdin is not None and sys.stdin.isatty() else most
