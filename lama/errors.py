"""Messages for the person at the keyboard: the exception that carries one, the warning, notes, hints, and quoted values."""

import contextlib
import difflib
import sys
import warnings
from collections.abc import Iterable


class LamaError(Exception):
    """Something the user can put right: the message says what is wrong, the value, and what to do.

    The command line prints it as one line, `lama: ...`, and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(LamaError):
    """An argument that is out of its range; the command line exits with 2, as for an unknown flag."""

    exit_code = 2


class LamaWarning(UserWarning):
    """Something worth knowing that stops nothing; the command line prints it as one line, `lama: ...`."""


def warn(message: str) -> None:
    """Issue a LamaWarning: from Python it can be filtered, on the command line each is a line on standard error, once."""
    warnings.warn(message, LamaWarning, stacklevel=3)


def note(message: object) -> None:
    """Print `lama: ...` on standard error; nothing where that is closed or cannot be written."""
    if sys.stderr is not None:  # print(file=None) would write to standard output
        with contextlib.suppress(OSError, ValueError):
            print(f"lama: {message}", file=sys.stderr, flush=True)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`. Did you mean learning_rate?`, or nothing where no word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {prefix}{near[0]}?" if near else ""


def quoted(value: object, most: int = 200, plain: bool = False) -> str:
    """A value in a message: on one line, at most `most` characters of it. `plain` leaves out a text's quotes."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # not all of a long one, which would only be cut again
    try:
        text = str(value) if plain else repr(value)
    except (RecursionError, ValueError):  # too deep; an integer of thousands of digits
        text = f"a {type(value).__name__} that is too large to show"
    text = text[: most + 1]
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[:most]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters of it; its kind if the message is empty."""
    return quoted((str(error).splitlines() or [""])[0], plain=True) or type(error).__name__
