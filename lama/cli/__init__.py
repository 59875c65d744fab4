"""The command line: the parser, `main`, and one-line errors with exit codes. Each verb has its own file."""

import argparse
import atexit
import gc
import importlib
import io
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeAlias

from lama import __version__
from lama.errors import LamaError, LamaWarning, UsageError, did_you_mean, first_line, note, quoted

Run: TypeAlias = Callable[[argparse.Namespace], int]
AddVerb: TypeAlias = Callable[..., "Parser"]
PIPE_CLOSED = 141  # 128 + SIGPIPE, as a shell reports it
TRACEBACK = "--traceback"
VERSION = ("-V", "--version")
MODEL = "a model's name, folder or file, as for lama generate"
# Modules of the verbs; `lama.cli.examples` has their groups.
MODULES = "generate chat serve train fuse seq2seq translate bert classify tokenizer data eval quantize"
MODULES += " export attention lens patch ablate heads course experiment doctor completion"


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. As after Ctrl-C, partly written files are removed."""

    def __init__(self, number: int):
        super().__init__("terminated" if number == signal.SIGTERM else "the terminal was closed")
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 + the number of the signal, as a shell reports it."""
    return 128 + getattr(stop, "number", signal.SIGINT)


class Parser(argparse.ArgumentParser):
    """argparse with lama's one-line errors, shorter declarations, and no abbreviated options."""

    def __init__(self, **options: Any):
        super().__init__(**options | {"allow_abbrev": False})
        self.add(TRACEBACK, "show where in the code an error comes from")
        self.verbs: Mapping[str, Parser] = {}
        self.examples: Sequence[str] = ()
        self._model: tuple[argparse.Action, argparse.Action] | None = None
        """-m MODEL, and MODEL as a positional argument."""

    def add(self, usage: str, help: str, default: float | str | None = None, **more: Any) -> argparse.Action:
        """Add an argument, written as --help shows it: `-n, --steps N`, or `--json` for a switch.

        A default determines the type. It is appended to the help text, unless that already mentions it.
        """
        *names, last = usage.replace(",", "").split()
        if not last.startswith("-"):
            more["metavar"] = last
        else:
            names.append(last)
            if "choices" not in more:
                more["action"] = "store_true"
        if "choices" in more:
            more["choices"] = list(more["choices"])  # argparse takes a dictionary for one of parsers
        if default is not None:
            more |= {"default": default, "type": type(default)}
            if "(default" not in help:
                help += f" (default {default:g})" if isinstance(default, float) else f" (default {default})"
        return self.add_argument(*names, help=help, **more)

    def add_verbs(self, dest: str) -> AddVerb:
        """Return a function that adds a verb: by its name, its `run`, and the docstring that --help shows."""
        verbs = self.add_subparsers(dest=dest, metavar=dest.upper(), required=True, parser_class=Parser)
        self.verbs = verbs.choices

        def add_verb(name: str, run: Run | None, doc: str | None, usage: str | None = None) -> Parser:
            summary, _, about = (doc or name).partition(".\n\n")
            help = summary[0].lower() + summary[1:]
            parser = verbs.add_parser(name, help=help, description=about.strip(), usage=usage)
            parser.set_defaults(run=run)
            if dest == "verb":
                from lama.cli.examples import EXAMPLES

                parser.examples = EXAMPLES.get(name, ())
            return parser

        return add_verb

    def format_help(self) -> str:
        """argparse's help, with the examples first and the verbs in groups."""
        text = super().format_help()
        if self.prog == "lama" and len(self.verbs) > 1:
            text = text.partition("positional arguments:")[0] + self._grouped()
        lines = [f"  {example}\n" for example in self.examples]
        return "".join(["examples:\n", *lines, "\n", text]) if lines else text

    def _grouped(self) -> str:
        """The verbs with a line each, under the headings of their groups, then the options."""
        (action,) = (each for each in self._actions if isinstance(each, argparse._SubParsersAction))
        helps = {str(each.dest): str(each.help) for each in action._choices_actions}
        from lama.cli.examples import GROUPS

        groups = {heading: names.split() for heading, names in GROUPS.items()}
        listed = {name for names in groups.values() for name in names}
        groups["more"] = [name for name in helps if name not in listed]
        parts = []
        for heading, names in groups.items():
            lines = [f"  {name:<12}{helps[name]}\n" for name in names if name in helps]
            parts += [f"{heading}:\n", *lines, "\n"] if lines else []
        return "".join(parts) + "`lama help VERB` describes a verb and its options; -V prints the version.\n"

    def add_model(self, help: str = MODEL) -> None:
        """Add -m MODEL, required. Call it before other positional arguments are added.

        Without -m, the first positional argument is the model; a command that succeeds then prints a hint.
        """
        option = self.add("-m, --model MODEL", help, required=True)
        self._model = option, self.add_argument("model", metavar="-m MODEL", help=argparse.SUPPRESS)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = [*(sys.argv[1:] if args is None else args)]
        if self._model is None:
            return super().parse_known_args(words, namespace)
        option, positional = self._model
        options = words[: words.index("--")] if "--" in words else words
        # The usage that --help prints shows -m MODEL.
        option.required = any(re.match("-m|-h|--help$|--model(=|$)", word) for word in options)
        positional.nargs = argparse.SUPPRESS if option.required else None
        found, unknown = super().parse_known_args(words, namespace)
        if not option.required:
            found.hint = f"write the model as -m {shlex.quote(found.model)}"
        return found, unknown

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self
            for name in ("verb", "action"):
                parser = parser.verbs.get(getattr(found, name, ""), parser)
            words = quoted(" ".join(unknown), plain=True)
            parser.error(f"unrecognized arguments: {words}{parser.near(unknown)}")
        return found

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            hint = did_you_mean(str(value), known)
            listed = "" if hint and len(known) > 9 else f" (choose from {', '.join(known)})"
            raise argparse.ArgumentError(action, f"invalid choice: {quoted(value)}{listed}{hint}")

    def _get_value(self, action: argparse.Action, text: str) -> object:
        if action.type in (int, float) and len(text) > 200:
            raise argparse.ArgumentError(action, f"invalid {action.type.__name__} value: {quoted(text)}")
        return super()._get_value(action, text)

    def _print_message(self, message: str, file: object = None) -> None:
        print(message, end="", flush=True)  # argparse ignores errors of writing

    def near(self, unknown: Sequence[str]) -> str:
        """`. Did you mean --steps?` for the first word near an option, or advice for a prompt without -p."""
        options = self._option_string_actions
        if "--prompt" in options and not unknown[0].startswith("-"):
            prompt = shlex.quote(quoted(" ".join(unknown), 60, plain=True))
            return f". A prompt is one argument of -p: -p {prompt}"
        known = [option.removeprefix("--") for option in options if option.startswith("--")]
        words = [word.lstrip("-").split("=")[0] for word in unknown if word.startswith("-")]
        return next(filter(None, (did_you_mean(word, known, "--") for word in words)), "")

    def error(self, message: str) -> None:  # type: ignore[override]
        if message.endswith("expected one argument"):
            message += "; write --option=VALUE where the value begins with -"
        option, ignored, _ = message.partition("ignored explicit argument")
        message = f"{option}takes no value" if ignored else message
        raise UsageError(f"{message}{'' if message.endswith('?') else '.'} See {self.prog} --help")


def make_parser(first: str | None = None) -> Parser:
    """The parser of all verbs, or of the one that is the `first` argument, if that needs no other."""
    parser = Parser(prog="lama", description="The transformer from scratch in tinygrad.")
    parser.add_argument(*VERSION, action="version", version=f"lama {__version__}")
    add_verb = parser.add_verbs("verb")
    names = MODULES.split()
    if first in names:
        names = [first]
    elif first in VERSION:
        names = []
    for name in names:
        importlib.import_module(f"lama.cli.{name}").add_parser(add_verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: success, 1: failure, 2: wrong usage, 129: SIGHUP, 130: Ctrl-C, 141: closed pipe, 143: SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    atexit.register(gc.freeze)  # otherwise a garbage collection at exit takes 0.25 s
    _prepare_streams()
    try:
        with _signals(), _warning_lines():
            if not argv:
                from lama.cli.examples import FIVE

                print(FIVE, flush=True)
                return 0
            if argv[0] == "help":
                argv = [*argv[1:], "--help"]
            args = make_parser(argv[0]).parse_args(argv, argparse.Namespace(argv=argv))
            code: int = args.run(args)
            if sys.stdout is not None:
                sys.stdout.flush()
            if code == 0 and "hint" in args:
                note(args.hint)
            return code
    except (Exception, KeyboardInterrupt) as error:
        code, message = explained(error)
        if TRACEBACK in argv:
            import traceback

            traceback.print_exc()
    _drop_output()
    if not (argv[:1] == ["train"] and _follows()):
        note(message)
    return code


def _follows() -> bool:
    from lama.training.launched import follows

    return follows()


def _prepare_streams() -> None:
    """Write UTF-8, and open the null device for closed streams so that no other file gets their numbers."""
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
        # Whatever the locale: a model may write any character, and file names may not be UTF-8.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn garbage collection off while modules and models load. Saves 50 ms."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _signals() -> Iterator[None]:
    """Raise Terminated for SIGTERM and SIGHUP, unless they are ignored, as after `nohup`.

    Python prints and drops an exception that a handler raises while an object is deleted. The signal is then
    sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    def resend(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            number = exit_code(lost.exc_value) - 128
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            hook(lost)

    ending = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    numbers = [number for number in ending if signal.getsignal(number) is signal.SIG_DFL]
    hook, sys.unraisablehook = sys.unraisablehook, resend
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
    """Print each LamaWarning once, as one line on standard error."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: object) -> None:
        if not issubclass(category, LamaWarning):
            plain(message, category, *place)  # type: ignore[arg-type]
        elif str(message) not in shown:
            shown.add(str(message))
            note(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LamaWarning)
        plain, warnings.showwarning = warnings.showwarning, show  # type: ignore[assignment]
        yield


def explained(error: Exception | KeyboardInterrupt) -> tuple[int, str]:
    """The exit code and the error line of a failed command."""
    if isinstance(error, LamaError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return exit_code(error), str(error) or "interrupted"
    from lama.files import quoted_path
    from lama.runtime.compiler import explain

    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED, "standard output was closed; stopped"
    if isinstance(error, MemoryError):
        why = f": {error}" if str(error) else ""
        return 1, f"out of memory{why}. Use a smaller model or batch"
    if reason := explain(error):
        return 1, reason
    if isinstance(error, OSError) and error.strerror:
        lost = isinstance(error, FileNotFoundError)
        where = "the current folder" if lost else "standard output or an open file"
        if error.filename is not None:
            where = quoted_path(error.filename)
        return 1, f"cannot read or write {where}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError):
        return 1, f"texts and names must be valid Unicode; got {quoted(error.object[error.start :])}"
    advice = f"Please report it with the output of {TRACEBACK}; `lama doctor` checks the installation"
    return 1, f"unexpected {type(error).__name__}: {first_line(error)}. {advice}"


def _drop_output() -> None:
    """Flush the output of a failed command; drop it if that fails, since Python would report it at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
