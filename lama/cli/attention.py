"""`lama attention`: which tokens the heads of a model look at while it reads a sentence."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.out import check_file, write_file
from lama.errors import UsageError

if TYPE_CHECKING:
    from lama.interp.attention import Attention

KINDS = ("self", "encoder", "decoder", "cross")  # lama.interp.attention's; spelled out, so that --help stays light
FILES = ("html", "png", "svg")
MANY = 100  # heads in a picture, which then takes seconds


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "attention",
        help="see which tokens the heads of a model look at",
        description="Show which tokens each head of a model looks at while it reads TEXT: in the terminal, as a page for a browser, "
        "offline, with all layers and heads to choose from, or as a picture of one head, a layer's heads, or all of them. The model is "
        "any that lama loads: a GPT, a BERT, a classifier, or an encoder-decoder, which reads TEXT as its source.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, a folder or a file, as for lama generate")
    add("text", nargs="?", metavar="TEXT", help="the sentence")
    add("--recorded", action="store_true", help="of a folder of lama train --record: the sentence recorded there, while the model learned")
    add("--layer", type=int, metavar="N", help="only this layer, counted from 0 (a page opens there)")
    add("--head", type=int, metavar="N", help="only this head, counted from 0")
    add("--kind", choices=KINDS, help="of an encoder-decoder: the encoder's, the decoder's, or cross-attention (default)")
    add("--target", metavar="TEXT", help="of an encoder-decoder: what it writes (default: what it would write)")
    add("--out", type=Path, metavar="FILE", help="write a page (.html) or a picture (.png, .svg), in place of drawing in the terminal")
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

    model, tokenizer = load(args.model, **machine.loading(args))
    kind, heads = chosen_heads(model, args.kind, args.layer, args.head)
    tokens = input_tokens(model, tokenizer, args.text)
    found = attention_of(model, tokenizer, tokens, read_target(model, tokenizer, tokens, args))
    if kind_of_file is None:
        print(f"{model.describe()}\n\n{drawing(found[kind], heads)}")
        return 0
    if kind_of_file == "html":
        from lama.interp.page import attention_page

        content = attention_page(found, f"{args.model}: {model.describe()}", kind, args.layer, args.head, args.text).encode()
    else:
        from lama.interp.pictures import heat_maps

        if len(heads) > MANY:
            print(f"drawing {len(heads)} heads", file=sys.stderr)
        many = args.layer is None and args.head is None
        content = heat_maps(panels(found[kind], heads), kind_of_file, len({head for _, head in heads}) if many else None)
    write_file(args.out, content, f"{len(found[kind].keys)} tokens, {len(heads)} heads", "attention")
    return 0


def show_recording(args: argparse.Namespace) -> int:
    """Write the page of a recording, or a picture of some of its moments."""
    if args.out is None or args.text is not None or args.target is not None or args.kind or args.layer is not None or args.head is not None:
        raise UsageError("--recorded must be given with --out FILE, and without a text or what to choose of it")
    kind = check_file(args.out, FILES, "attention")
    content, what = recording_view(Path(args.model), kind)
    write_file(args.out, content, what, "attention")
    return 0


def recording_view(folder: Path, kind: str) -> tuple[bytes, str]:
    """The recording in a run's folder as a file of that kind, and what is in it in words. Raises LamaError."""
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
        page = training_page(found.patterns, found.steps, found.losses, found.heads, labels, str(folder), found.text)
        return page.encode(), f"{len(found.steps)} moments of {len(found.heads)} heads"
    rows = moment_panels(found.patterns, found.steps, found.heads, labels)
    picture = heat_maps([panel for row in rows for panel in row], kind, len(rows[0]))
    return picture, f"{len(rows[0])} of {len(found.steps)} moments of {len(rows)} heads"


def read_target(model: Any, tokenizer: Any, tokens: list[int], args: argparse.Namespace) -> list[int]:
    """What an encoder-decoder writes: the given text, or its own. Raises UsageError for a target that is given to another model."""
    from lama.models.transformer import Transformer

    if not isinstance(model, Transformer):
        if args.target is not None:
            raise UsageError("--target must be given to encoder-decoders only; leave it out")
        return []
    if args.target is not None:
        return list(tokenizer.encode(args.target))
    from lama.generation.seq2seq import Searcher

    (written,) = Searcher(model).greedy([tokens])
    return written.tokens[: model.config.context_length - 1]


def drawing(attention: "Attention", heads: list[tuple[int, int]]) -> str:
    """In characters: each head; of all heads of several layers, a line each."""
    from lama.interp.attention import draw_pattern, summary

    if len({layer for layer, _ in heads}) > 1 and len({head for _, head in heads}) > 1:
        return f"{summary(attention, heads)}\n\n(--layer N draws the heads of a layer; --out FILE.html shows all of them)"
    room = shutil.get_terminal_size().columns - max(map(len, attention.queries)) - 2
    gap = " " if not sys.stdout.isatty() or 2 * len(attention.keys) <= room else ""
    drawn = (draw_pattern(attention.patterns[layer, head], attention.queries, attention.keys, gap) for layer, head in heads)
    return "\n\n".join(f"layer {layer}, head {head}\n{picture}" for (layer, head), picture in zip(heads, drawn, strict=True))
