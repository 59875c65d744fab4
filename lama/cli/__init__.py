"""The command line: one file a verb; here they meet, and here errors become one line and an exit code."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lama.errors import LamaError, UsageError, did_you_mean

INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143  # 128 + SIGINT, SIGPIPE, SIGTERM: what a shell reports for a program so ended


class Terminated(KeyboardInterrupt):
    """SIGTERM came: as after Ctrl-C, what is half-written is taken away."""


class Parser(argparse.ArgumentParser):
    """argparse with lama's one-line errors; an option is written in full."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"allow_abbrev": False})
        self.verbs: Mapping[str, Parser] = {}
        """The verbs' own parsers."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self
            for name in ("verb", "action"):
                parser = parser.verbs.get(getattr(found, name, ""), parser)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{parser.near(unknown)}")
        return found

    def near(self, unknown: Sequence[str]) -> str:
        """`. Did you mean --steps?` for the first of them that is like an option."""
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        hints = (did_you_mean(word.lstrip("-").split("=")[0], known, "--") for word in unknown if word.startswith("-"))
        return next(filter(None, hints), "")

    def error(self, message: str) -> None:  # type: ignore[override]
        if message.endswith("expected one argument"):
            message += "; write --option=VALUE where the value begins with -"
        raise UsageError(f"{message}{'' if message.endswith('?') else '.'} See {self.prog} --help")


def make_parser() -> Parser:
    from lama.cli import (
        ablate,
        attention,
        bert,
        classify,
        doctor,
        eval,
        experiment,
        export,
        generate,
        heads,
        lens,
        patch,
        quantize,
        seq2seq,
        tokenizer,
        train,
        translate,
    )

    parser = Parser(prog="lama", description="The transformer from scratch in tinygrad.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for module in (
        generate,
        train,
        seq2seq,
        translate,
        bert,
        classify,
        tokenizer,
        eval,
        quantize,
        export,
        attention,
        lens,
        patch,
        ablate,
        heads,
        experiment,
        doctor,
    ):
        module.add_parser(verbs)
    parser.verbs = verbs.choices
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, 141 for a closed pipe, 143 for
    SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: a model may write any character
    verbose = any(word in ("-v", "--verbose") for word in argv)
    try:
        with _terminable():
            args = make_parser().parse_args(argv)
            code: int = args.run(args)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except LamaError as error:
        return _fail(str(error), error.exit_code, verbose)
    except BrokenPipeError:
        # Nobody reads standard output any more; without this, Python complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail("standard output was closed; stopped", PIPE_CLOSED, verbose=False)
    except Terminated:
        return _fail("terminated", TERMINATED, verbose=False)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, verbose=False)
    except MemoryError as error:
        return _fail(f"the memory must hold the model and its work; got {error or 'too little'}. Take a smaller model or batch", 1, verbose)
    except Exception as error:
        from lama.compiler import explain

        if (reason := explain(error)) is None:
            raise
        return _fail(reason, 1, verbose)


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it, SIGTERM raises Terminated."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int, verbose: bool) -> int:
    if verbose:
        import traceback

        traceback.print_exc()
    print(f"lama: {message}", file=sys.stderr)
    return code
