"""Lines of standard input, for commands that print one line for each of them."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from lama.errors import LamaError, UsageError, note

LONGEST = 1 << 20  # bytes of a line that is answered
BLOCK = 1 << 16  # bytes read at a time
# Characters that would break a line, as escapes.
BREAKS = {ord(c): repr(c)[1:-1] for c in "\n\r"}
BREAKS |= {ord(c): f"\\u{ord(c):04x}" for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


def input_text() -> str:
    """Read standard input, without the final line break. Raises LamaError if it is closed or not UTF-8."""
    check_open()
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise LamaError(f"standard input must be UTF-8 text; got byte 0x{byte:02x}") from error


def check_open() -> None:
    """Raises UsageError where standard input is closed."""
    if sys.stdin is None:
        raise UsageError("standard input must be open for -; got none. Give the text itself")


def answer_lines(answers: Callable[[list[str]], Iterable[str]], most: int) -> int:
    """Print one line for each line of standard input, in order and without delay. Returns the exit code.

    `answers` returns one line for each of up to `most` texts. An empty line is answered by an empty line. So
    is a line for which `answers` raises LamaError: the error is printed with the line's number, and the exit
    code is 1.
    """
    check_open()
    number = code = 0
    for lines in _batches(most):
        for answer in _answers(answers, lines):
            number += 1
            if isinstance(answer, LamaError):
                code = 1
                note(f"line {number}: {answer}")
            print("" if isinstance(answer, LamaError) else answer.translate(BREAKS))
        sys.stdout.flush()
    return code


def _answers(answers: Callable[[list[str]], Iterable[str]], lines: list[bytes]) -> list[str | LamaError]:
    """The answers to all lines from one call or, if that fails, from one call for each line."""
    try:
        texts = [_text(line) for line in lines]
        wanted = [text for text in texts if text.strip()]
        found = iter(answers(wanted) if wanted else ())
        return [next(found) if text.strip() else "" for text in texts]
    except LamaError as error:
        if len(lines) == 1:
            return [error]
        return [answer for line in lines for answer in _answers(answers, [line])]


def _text(line: bytes) -> str:
    if len(line) > LONGEST:
        raise LamaError(f"a line must have at most {LONGEST:,} bytes; got more")
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise LamaError(f"the text must be UTF-8; got byte 0x{line[error.start]:02x}") from None


def _batches(most: int) -> Iterator[list[bytes]]:
    """Yield the lines that have arrived on standard input, up to `most` at a time. Never waits for more."""
    file = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
    rest, mark = b"", b"\xef\xbb\xbf"
    while block := file.read1(BLOCK):
        *lines, rest = (rest + block).removeprefix(mark).split(b"\n")
        rest, mark = rest[: LONGEST + 1], b""
        yield from (lines[i : i + most] for i in range(0, len(lines), most))
    if rest:
        yield [rest]


def in_batches(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    return (list(texts[i : i + size]) for i in range(0, len(texts), size))


def at_once(most: int) -> int:
    """The number of lines of standard input in a batch: one on a terminal."""
    return 1 if sys.stdin is not None and sys.stdin.isatty() else most
