"""Print a script that completes lama's verbs and options in a shell.

Write it where the shell looks for completions, and start a new shell. Needs shtab.
"""

import argparse

from lama.cli import AddVerb, make_parser
from lama.errors import LamaError

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("completion", run, __doc__)
    parser.add("shell SHELL", f"one of {', '.join(SHELLS)}", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise LamaError("completion needs shtab; pip install 'lama[completion]'") from None
    print(shtab.complete(make_parser(), args.shell))
    return 0
