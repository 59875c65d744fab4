"""Messages to the user: exceptions, warnings, notes, hints and quoted values."""

import contextlib
import difflib
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence


class LamaError(Exception):
    """An error that the user can correct: the message says what is wrong, the value, and what to do.

    The command line prints it as one line, `lama: ...`, and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(LamaError):
    """A wrong argument; the command line exits with 2, as for an unknown flag."""

    exit_code = 2


class LamaWarning(UserWarning):
    """A warning, which the command line prints as one line, `lama: ...`."""


def warn(message: str) -> None:
    """Issue a LamaWarning, which Python can filter and the command line prints once."""
    warnings.warn(message, LamaWarning, stacklevel=3)


def note(message: object) -> None:
    """Print `lama: ...` on standard error, if that is open and can be written."""
    if sys.stderr is not None:  # print(file=None) would write to standard output
        with contextlib.suppress(OSError, ValueError):
            print(f"lama: {message}", file=sys.stderr, flush=True)


def check_least(name: str, value: float | None, least: float) -> None:
    """Raise UsageError for a value below `least`."""
    if value is not None and value < least:
        raise UsageError(f"{name} must be at least {least}; got {value}")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`. Did you mean learning_rate?`, or an empty text if no known word is close."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {prefix}{near[0]}?" if near else ""


def quoted(value: object, most: int = 200, plain: bool = False) -> str:
    """A value in a message: one line of at most `most` characters. `plain` leaves out a text's quotes."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # repr of a long text would be slow
    try:
        text = str(value) if plain else repr(value)
    except (RecursionError, ValueError):  # too deep; an integer of thousands of digits
        text = f"a {type(value).__name__} that is too large to show"
    text = printable(text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."


def printable(text: str) -> str:
    """The text with escapes, such as `\\n`, in place of characters that cannot be printed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def abbreviated(names: Sequence[str], spelled: Callable[[str], str] = str, most: int = 4) -> str:
    """The first `most` names, and the number of the others."""
    shown = quoted(", ".join(map(spelled, names[:most])), plain=True)
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Up to 200 characters of the first line of an error's message, or else the error's type."""
    return quoted((str(error).splitlines() or [""])[0], plain=True) or type(error).__name__
