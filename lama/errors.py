"""The one exception whose message is meant for the person at the keyboard, and the hint that may end it."""

import difflib
from collections.abc import Iterable


class LamaError(Exception):
    """Something the user can put right: the message says what is wrong, the value, and what to do.

    The command line prints it as one line, `lama: ...`, and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(LamaError):
    """An argument that is out of its range; the command line exits with 2, as for an unknown flag."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`. Did you mean learning_rate?`, or nothing where no word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {prefix}{near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line; its kind if it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
