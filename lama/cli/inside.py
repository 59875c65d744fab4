"""Code shared by the commands that look inside a GPT: the model, tokens from the command line, tables, and the picture."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.lines import input_lines
from lama.cli.live import progress
from lama.cli.out import check_file, write_file
from lama.errors import UsageError, note

if TYPE_CHECKING:
    import numpy as np

    from lama.interp.pictures import HeatMap

FILES = ("png", "svg")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GPT: a name, a folder or a file, as for lama generate")


def add_answers(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    add("--answer", metavar="TOKEN", required=required, help="a token that may come next; a space before a word is part of it")
    add("--against", metavar="TOKEN", required=required, help="another one: the answer's logit is taken above this one's")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="also write a picture (.png, .svg)")
    machine.add_loading(parser)


def load(args: argparse.Namespace) -> Any:
    """(model, tokenizer): where a picture goes is looked at before the model is. Raises LamaError for a model that is no GPT."""
    if args.out:
        check_file(args.out, FILES, args.verb)
    machine.use(args)
    from lama.checkpoints import load_gpt

    return load_gpt(args.model, **machine.loading(args))


def read_tokens(model: Any, tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt; of `-`, of standard input. Raises LamaError where it is empty or too long."""
    from lama.data.inputs import input_tokens

    return input_tokens(model, tokenizer, "\n".join(input_lines()) if text == "-" else text)


def read_answer(tokenizer: Any, text: str | None) -> int | None:
    """The token that was typed, with a note where it may be another one than was meant. Raises LamaError."""
    if text is None:
        return None
    from lama.interp.answers import single_token, with_space
    from lama.interp.labels import token_labels

    token, spaced = single_token(tokenizer, text), with_space(tokenizer, text)
    if spaced is not None and not text[0].isspace():
        (label,) = token_labels(tokenizer, [spaced])
        if token == spaced:
            note(f"{text!r} is taken as {label}: it is one token only with the space before it")
        else:
            note(f"{text!r} is taken as it stands; {label}, with the space before it, is another token: for that one, write ' {text}'")
    return token


def check_against(args: argparse.Namespace) -> None:
    if args.against is not None and args.answer is None:
        raise UsageError("--against must stand beside --answer; got --against alone")


def matrix_table(title: str, values: "np.ndarray", rows: Sequence[str], columns: Sequence[str]) -> str:
    """A title and a table of numbers with three decimals."""
    from lama.experiments.report import Table

    cells = [[label, *(f"{value:.3f}" for value in row)] for label, row in zip(rows, values, strict=True)]
    return str(Table([title, *columns], cells))


def head_table(title: str, values: "np.ndarray") -> str:
    """A number for each head, (layers, heads)."""
    layers, heads = values.shape
    return matrix_table(title, values, [f"layer {i}" for i in range(layers)], [str(i) for i in range(heads)])


def layer_map(values: "np.ndarray", title: str, columns: Sequence[str] | None = None, x: str = "", **options: Any) -> "HeatMap":
    """A row for each layer, the first at the bottom; without `columns`, one for each head. The rest is HeatMap's."""
    from lama.interp.pictures import HeatMap

    layers, n = values.shape
    if columns is None:
        columns, x = [str(i) for i in range(n)], x or "head"
    return HeatMap(values[::-1], title, [f"layer {i}" for i in range(layers)][::-1], columns, x, **options)


def write_picture(args: argparse.Namespace, panels: "Sequence[HeatMap]", columns: int | None = None) -> int:
    """Write `--out`, where it is given, and say so; returns the exit code."""
    if not args.out:
        return 0
    from lama.interp.pictures import heat_maps

    content = heat_maps(panels, check_file(args.out, FILES, args.verb), columns)
    write_file(args.out, content, "a heat map" if len(panels) == 1 else f"{len(panels)} heat maps", args.verb)
    return 0


def watch(steps: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    """The steps, with how many are done where there is more than one."""
    return steps if total == 1 else progress(steps, "batch", label, total)
