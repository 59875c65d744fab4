"""The one exception whose message is meant for the person at the keyboard."""


class LamaError(Exception):
    """Something the user can put right: the message says what is wrong, the value, and what to do.

    The command line prints it as one line, `lama: ...`, and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(LamaError):
    """An argument that is out of its range; the command line exits with 2, as for an unknown flag."""

    exit_code = 2
