"""Shared code of the commands that inspect a GPT: arguments, the model, tokens, tables and pictures."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import Parser, machine
from lama.cli.lines import input_text
from lama.cli.live import progress
from lama.cli.out import check_file, write_file
from lama.errors import UsageError, note
from lama.figures import IMAGE_FORMATS

if TYPE_CHECKING:
    from lama.interp.pictures import HeatMap
    from lama.models.gpt import GPT
    from lama.shapes import Array
    from lama.tokenizers import Tokenizer

MODEL = "a GPT: a name, a folder or a file, as for lama generate"


def add_answers(parser: Parser, required: bool) -> None:
    answer = "a token that may come next; a space before a word is part of it"
    parser.add("--answer TOKEN", answer, required=required)
    against = "another token, whose logit is subtracted from the answer's"
    parser.add("--against TOKEN", against, required=required)


def add_options(parser: Parser) -> None:
    parser.add("--out FILE", "also write a picture (.png, .svg)", type=Path)
    machine.add_loading(parser)


def load(args: argparse.Namespace) -> "tuple[GPT, Tokenizer]":
    """Check the options, then load the model. Raises LamaError for a model other than a GPT."""
    if getattr(args, "against", None) is not None and args.answer is None:
        raise UsageError("--against needs --answer; got --against alone")
    if args.out:
        check_file(args.out, IMAGE_FORMATS, args.verb)
    machine.use(args)
    from lama.checkpoints import load_causal

    return load_causal(args.model, **machine.loading(args))


def read_tokens(model: "GPT", tokenizer: "Tokenizer", text: str) -> list[int]:
    """Encode a prompt; `-` reads standard input. Raises LamaError for an empty or long prompt."""
    from lama.data.inputs import input_tokens

    return input_tokens(model, tokenizer, input_text() if text == "-" else text)


def first_token(model: "GPT", tokenizer: "Tokenizer") -> int | None:
    """The end-of-text token, which precedes random tokens; None if the model has none."""
    begin = tokenizer.end_of_text
    return None if begin is None or begin >= model.config.vocab_size else begin


def read_answers(tokenizer: "Tokenizer", args: argparse.Namespace) -> tuple[int | None, int | None]:
    """The tokens of --answer and --against. Prints a note if another may be meant. Raises LamaError."""
    return _answer(tokenizer, args.answer), _answer(tokenizer, args.against)


def _answer(tokenizer: "Tokenizer", text: str | None) -> int | None:
    if text is None:
        return None
    from lama.interp.answers import single_token, with_space
    from lama.interp.labels import token_labels

    token, spaced = single_token(tokenizer, text), with_space(tokenizer, text)
    if spaced is not None and not text[0].isspace():
        (label,) = token_labels(tokenizer, [spaced])
        if token == spaced:
            note(f"{text!r} is read as {label}: it is one token only with the space before it")
        else:
            note(f"{text!r} is read without a space; for the token {label} write ' {text}'")
    return token


def matrix_table(title: str, values: "Array", rows: Sequence[str], columns: Sequence[str]) -> str:
    from lama.tables import Table

    cells = [[label, *(f"{value:.3f}" for value in row)] for label, row in zip(rows, values, strict=True)]
    return str(Table([title, *columns], cells))


def head_table(title: str, values: "Array") -> str:
    """A table of one number for each head, (layers, heads)."""
    layers, heads = values.shape
    return matrix_table(title, values, [f"layer {i}" for i in range(layers)], [str(i) for i in range(heads)])


def layer_map(values: "Array", title: str, columns: Sequence[str] | None = None, **options: Any) -> "HeatMap":
    """A heat map with a row for each layer, the first at the bottom; columns are heads by default."""
    from lama.interp.pictures import HeatMap

    layers, n = values.shape
    if columns is None:
        columns, options = [str(i) for i in range(n)], {"x": "head", **options}
    rows = [f"layer {i}" for i in reversed(range(layers))]
    return HeatMap(values[::-1], title, rows, columns, **options)


def write_picture(args: argparse.Namespace, panels: "Sequence[HeatMap]") -> int:
    if not args.out:
        return 0
    from lama.interp.pictures import heat_maps

    content = heat_maps(panels, check_file(args.out, IMAGE_FORMATS, args.verb))
    write_file(args.out, content, "a heat map" if len(panels) == 1 else f"{len(panels)} heat maps", args.verb)
    return 0


def watch(batches: Iterable[int], total: int, label: str) -> Iterable[int]:
    return batches if total == 1 else progress(batches, total, label=label)
