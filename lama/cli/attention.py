"""Show the tokens that the heads of a model look at.

Show the tokens that each head of a model looks at while it reads TEXT. The result is drawn in the terminal,
or written as an offline page with all layers and heads, or as a picture of one head, a layer's heads or all
of them. The model is a GPT, a BERT, a classifier, or an encoder-decoder, which reads TEXT as its source.
"""

import argparse
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine
from lama.cli.live import say
from lama.cli.out import check_file, write_file
from lama.errors import UsageError
from lama.figures import IMAGE_FORMATS
from lama.interp import ATTENTION_KINDS

if TYPE_CHECKING:
    from lama.interp.attention import Attention, Model
    from lama.tokenizers import Tokenizer

FILES = ("html", *IMAGE_FORMATS)
MANY = 100  # heads in a picture that takes seconds to draw


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("attention", run, __doc__)
    parser.add_model()
    add = parser.add
    add("text TEXT", "the sentence", nargs="?")
    add("--recorded", "show the recording in a folder of lama train --record")
    add("--layer N", "only this layer, counted from 0 (a page opens there)", type=int)
    add("--head N", "only this head, counted from 0", type=int)
    kinds = "for an encoder-decoder: the encoder's, the decoder's, or cross-attention (default)"
    add("--kind", kinds, choices=ATTENTION_KINDS)
    add("--target TEXT", "for an encoder-decoder: its output (default: greedy decoding)")
    out = "write a page (.html) or a picture (.png, .svg) instead of drawing in the terminal"
    add("--out FILE", out, type=Path)
    machine.add_loading(parser)


def run(args: argparse.Namespace) -> int:
    if args.recorded:
        return show_recording(args)
    kind_of_file = check_file(args.out, FILES, "attention") if args.out else None
    if not args.text or args.target == "":
        raise UsageError(f"{'--target' if args.text else 'TEXT'} must not be empty; give a sentence")
    machine.use(args)
    from lama.checkpoints import load
    from lama.data.inputs import input_tokens
    from lama.interp.attention import attention_of, chosen_heads, panels
    from lama.models.registry import describe

    model, tokenizer = load(args.model, **machine.loading(args))
    kind, heads = chosen_heads(model, args.kind, args.layer, args.head)
    tokens = input_tokens(model, tokenizer, args.text)
    found = attention_of(model, tokenizer, tokens, read_target(model, tokenizer, tokens, args.target))
    if kind_of_file is None:
        print(f"{describe(model)}\n\n{drawing(found[kind], heads)}")
        return 0
    if kind_of_file == "html":
        from lama.interp.page import attention_page

        about = f"{args.model}: {describe(model)}"
        content = attention_page(found, about, kind, args.layer, args.head, args.text).encode()
    else:
        from lama.interp.pictures import heat_maps

        if len(heads) > MANY:
            say(f"drawing {len(heads)} heads")
        all_heads = args.layer is None and args.head is None
        columns = len({head for _, head in heads}) if all_heads else None
        content = heat_maps(panels(found[kind], heads), kind_of_file, columns)
    n = "1 head" if len(heads) == 1 else f"{len(heads)} heads"
    write_file(args.out, content, f"{len(found[kind].keys)} tokens, {n}", "attention")
    return 0


def show_recording(args: argparse.Namespace) -> int:
    others = {args.text, args.target, args.kind, args.layer, args.head}
    if args.out is None or others != {None}:
        rule = "with --out FILE, and without TEXT, --target, --kind, --layer and --head"
        raise UsageError(f"--recorded must be given {rule}")
    kind = check_file(args.out, FILES, "attention")
    content, what = recording_view(Path(args.model), kind)
    write_file(args.out, content, what, "attention")
    return 0


def recording_view(folder: Path, kind: str) -> tuple[bytes, str]:
    """The recording of a run as a file of that kind, and a description of it. Raises LamaError."""
    from lama.checkpoints import load_tokenizer
    from lama.interp.attention import moment_panels
    from lama.interp.labels import token_labels
    from lama.interp.page import training_page
    from lama.interp.pictures import heat_maps
    from lama.training.folder import RunFolder
    from lama.training.recording import read_recording

    found = read_recording(RunFolder(folder).recording_file)
    labels = token_labels(load_tokenizer(folder), found.tokens)
    if kind == "html":
        about = found.losses, found.heads, labels, str(folder), found.text
        page = training_page(found.patterns, found.steps, *about)
        return page.encode(), f"{len(found.steps)} moments of {len(found.heads)} heads"
    rows = moment_panels(found.patterns, found.steps, found.heads, labels)
    picture = heat_maps(list(chain.from_iterable(rows)), kind, len(rows[0]))
    return picture, f"{len(rows[0])} of {len(found.steps)} moments of {len(rows)} heads"


def read_target(model: "Model", tokenizer: "Tokenizer", tokens: list[int], text: str | None) -> list[int]:
    """An encoder-decoder's output: --target, or greedy decoding. Raises UsageError for other models."""
    from lama.models.encoder_decoder import Transformer

    if not isinstance(model, Transformer):
        if text is not None:
            raise UsageError("--target is for encoder-decoders only; leave it out")
        return []
    if text is not None:
        return tokenizer.encode(text)
    from lama.generation.seq2seq import Searcher

    (written,) = Searcher(model).greedy([tokens])
    return written.tokens[: model.config.context_length - 1]


def drawing(attention: "Attention", heads: list[tuple[int, int]]) -> str:
    """The patterns in characters; for all heads of several layers, a line for each head."""
    from lama.interp.attention import draw_pattern, summary

    if len({layer for layer, _ in heads}) > 1 and len({head for _, head in heads}) > 1:
        more = "(--layer N draws the heads of a layer; --out FILE.html shows all of them)"
        return f"{summary(attention, heads)}\n\n{more}"
    room = shutil.get_terminal_size().columns - max(map(len, attention.queries)) - 2
    gap = " " if not sys.stdout.isatty() or 2 * len(attention.keys) <= room else ""
    drawn = []
    for layer, head in heads:
        picture = draw_pattern(attention.patterns[layer, head], attention.queries, attention.keys, gap)
        drawn.append(f"layer {layer}, head {head}\n{picture}")
    return "\n\n".join(drawn)
