"""The command line: one file a verb. Here they meet, and errors become one line and an exit code."""

import argparse
import importlib
import io
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from lama import __version__
from lama.errors import LamaError, LamaWarning, UsageError, did_you_mean, first_line, note, quoted

PIPE_CLOSED = 141  # 128 + SIGPIPE: what a shell reports for a program that it ended
TRACEBACK = "--traceback"
MODULES = (
    *("generate", "train", "seq2seq", "translate", "bert", "classify", "tokenizer", "eval", "quantize", "export"),
    *("attention", "lens", "patch", "ablate", "heads", "experiment", "doctor"),
)
"""Each adds a verb, or some, in this order."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: as after Ctrl-C, partly written files are removed."""

    def __init__(self, number: int):
        super().__init__("terminated" if number == signal.SIGTERM else "the terminal was closed")
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal, as a shell reports it."""
    return 128 + getattr(stop, "number", signal.SIGINT)


class Parser(argparse.ArgumentParser):
    """argparse with lama's one-line errors, in which options are written in full."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"allow_abbrev": False})
        self.add_argument(TRACEBACK, action="store_true", help="show where in the code an error comes from")
        self.verbs: Mapping[str, Parser] = {}
        """The verbs' own parsers."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self
            for name in ("verb", "action"):
                parser = parser.verbs.get(getattr(found, name, ""), parser)
            parser.error(f"unrecognized arguments: {quoted(' '.join(unknown), plain=True)}{parser.near(unknown)}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            hint = did_you_mean(str(value), known)
            listed = "" if hint and len(known) > 9 else f" (choose from {', '.join(known)})"
            raise argparse.ArgumentError(action, f"invalid choice: {quoted(value)}{listed}{hint}")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        if action.type in (int, float) and len(text) > 200:
            raise argparse.ArgumentError(action, f"invalid {action.type.__name__} value: {quoted(text)}")
        return super()._get_value(action, text)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", flush=True)  # argparse does not report that it could not be written

    def near(self, unknown: Sequence[str]) -> str:
        """`. Did you mean --steps?` for the first of them that is like an option; of a prompt without -p, where it goes."""
        if "--prompt" in self._option_string_actions and not unknown[0].startswith("-"):
            return f". A prompt is one argument of -p: -p {shlex.quote(quoted(' '.join(unknown), 60, plain=True))}"
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        hints = (did_you_mean(word.lstrip("-").split("=")[0], known, "--") for word in unknown if word.startswith("-"))
        return next(filter(None, hints), "")

    def error(self, message: str) -> None:  # type: ignore[override]
        if message.endswith("expected one argument"):
            message += "; write --option=VALUE where the value begins with -"
        option, ignored, _ = message.partition("ignored explicit argument")
        message = f"{option}takes no value" if ignored else message
        raise UsageError(f"{message}{'' if message.endswith('?') else '.'} See {self.prog} --help")


def make_parser() -> Parser:
    epilog = "`lama help VERB` describes a verb and its options."
    parser = Parser(prog="lama", description="The transformer from scratch in tinygrad.", epilog=epilog)
    parser.add_argument("-V", "--version", action="version", version=f"lama {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name in MODULES:
        importlib.import_module(f"lama.cli.{name}").add_parser(verbs)
    parser.verbs = verbs.choices
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 for success, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, 141 for a closed pipe, 143 for SIGTERM, 129 for SIGHUP.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        with _signals(), _warning_lines():
            args = make_parser().parse_args(_without_help(argv))
            code: int = args.run(args)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except (Exception, KeyboardInterrupt) as error:
        code, message = _explained(error)
        if TRACEBACK in argv:
            import traceback

            traceback.print_exc()
    _drop_output()
    note(message)
    return code


def _without_help(argv: list[str]) -> list[str]:
    """`help VERB` as `VERB --help`. Raises UsageError where nothing is asked for."""
    if not argv:
        raise UsageError("a verb must say what to do, such as generate or train. See lama help")
    return [*argv[1:], "--help"] if argv[0] == "help" else argv


def _prepare_streams() -> None:
    """Open the null device where a standard stream is closed, so that no other file gets its number, and write UTF-8."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if (no_color := os.environ.get("NO_COLOR")) is not None:
        os.environ["NO_COLOR"] = str(int(no_color != ""))  # tinygrad reads a number
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Whatever the locale: a model may write any character, and a file's name may hold bytes that are none.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


@contextmanager
def _signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP raise Stopped, unless they are ignored, as after `nohup`.

    What a handler raises while an object is deleted, Python prints and forgets: the signal is then sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    def send_again(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            number = exit_code(lost.exc_value) - 128
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            hook(lost)

    numbers = [n for n in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)) if signal.getsignal(n) is signal.SIG_DFL]
    hook, sys.unraisablehook = sys.unraisablehook, send_again
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _warning_lines() -> Iterator[None]:
    """Within it, each LamaWarning is one line on standard error, once."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, LamaWarning):
            plain(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            note(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LamaWarning)
        plain, warnings.showwarning = warnings.showwarning, show
        yield


def _explained(error: Exception | KeyboardInterrupt) -> tuple[int, str]:
    """The exit code and the line for whatever ended a command."""
    if isinstance(error, LamaError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return exit_code(error), str(error) or "interrupted"
    from lama.compiler import explain
    from lama.files import quoted_path

    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED, "standard output was closed; stopped"
    if isinstance(error, MemoryError):
        return 1, f"the memory must hold the model and its work; got {error or 'too little'}. Take a smaller model or batch"
    if reason := explain(error):
        return 1, reason
    if isinstance(error, OSError) and error.strerror:
        nameless = "the current folder" if isinstance(error, FileNotFoundError) else "standard output or an open file"
        where = nameless if error.filename is None else quoted_path(error.filename)
        return 1, f"cannot read or write {where}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError):
        return 1, f"texts and names must be valid Unicode; got {quoted(error.object[error.start :])}"
    advice = f"Please report it with what {TRACEBACK} shows; `lama doctor` looks for a reason"
    return 1, f"unexpected {type(error).__name__}: {first_line(error)}. {advice}"


def _drop_output() -> None:
    """Write what a failed command has printed. Where that fails drop it, since Python would report that again at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
