"""`lama lens`: predictions after each layer of a model, and each part's share in the answer's logit."""

import argparse
from typing import TYPE_CHECKING

from lama.cli import Verbs
from lama.cli.inside import (
    GPT_MODEL,
    add_answers,
    add_options,
    check_against,
    head_table,
    layer_map,
    load,
    read_answer,
    read_tokens,
    write_picture,
)
from lama.errors import LamaError, note

if TYPE_CHECKING:
    from lama.interp.lens import Attribution, Lens
    from lama.interp.pictures import HeatMap
    from lama.tokenizers import Tokenizer

SHOWN = 4  # likeliest tokens


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "lens",
        help="show a model's predictions after each layer",
        description="Apply the final norm and the unembedding to the stream after each layer: the likeliest "
        "tokens after PROMPT, and the rank and probability of the answer. With --answer, also print how much "
        "each layer's attention and MLP, and each head, add to the answer's logit, above that of the token "
        "--against, or above the mean of all.",
    )
    parser.set_defaults(run=run)
    parser.add_model(GPT_MODEL)
    parser.add_argument("text", metavar="PROMPT", help="the text to continue; - reads standard input")
    add_answers(parser, required=False)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    check_against(args)
    model, tokenizer = load(args)
    tokens = read_tokens(model, tokenizer, args.text)
    answer, against = read_answer(tokenizer, args.answer), read_answer(tokenizer, args.against)
    from lama.interp.labels import token_labels
    from lama.interp.lens import attribute, logit_lens

    lens = logit_lens(model, tokens, answer, SHOWN)
    names = token_labels(tokenizer, [lens.answer] if against is None else [lens.answer, against])
    print(lens_table(lens, names[0], tokenizer))
    panels = lens_panels(lens, names[0], token_labels(tokenizer, tokens))
    if answer is not None:
        try:
            found = attribute(model, tokens, answer, against)
        except LamaError as error:  # the parts do not add up; the lens works all the same
            note(f"no attribution: {error}")
            return write_picture(args, panels)
        what = f"{names[0]} above {names[1] if against is not None else 'the mean of all tokens'}"
        print(f"\n{attribution_table(found, what)}")
        panels += attribution_panels(found, what)
    return write_picture(args, panels)


def stages(lens: "Lens") -> list[str]:
    return ["embedding", *(f"layer {i}" for i in range(len(lens.rank) - 1))]


def lens_table(lens: "Lens", answer: str, tokenizer: "Tokenizer") -> str:
    """The predictions after the prompt's last token, a row for each stage."""
    from lama.interp.labels import token_labels
    from lama.tables import Table

    rows = []
    for i, stage in enumerate(stages(lens)):
        labels = token_labels(tokenizer, lens.top[i, -1])
        likeliest = zip(labels, lens.top_probability[i, -1], strict=True)
        cells = [f"{label} {p:.1%}" for label, p in likeliest]
        rows.append([stage, *cells, f"{lens.rank[i, -1]:,}", f"{lens.probability[i, -1]:.2%}"])
    blank = [""] * (lens.top.shape[-1] - 1)
    columns = ["after", "likeliest", *blank, f"rank of {answer}", f"probability of {answer}"]
    return str(Table(columns, rows))


def attribution_table(found: "Attribution", what: str) -> str:
    """The parts that add up to the logit difference, and the heads in them."""
    from lama.tables import Table

    total = sum(found.parts.values())
    values = {**found.parts, "sum": total, "the model's logits": found.difference}
    parts = Table([what, "adds"], [[name, f"{value:+.3f}"] for name, value in values.items()])
    if not len(found.heads):
        return str(parts)
    return f"{parts}\n\n{head_table('by head', found.heads)}"


def lens_panels(lens: "Lens", answer: str, tokens: list[str]) -> "list[HeatMap]":
    from lama.interp.pictures import HeatMap

    rows, title, unit = stages(lens)[::-1], f"probability of {answer}", "probability"
    top = lens.top_probability[::-1, :, 0]
    return [
        HeatMap(lens.probability[::-1], title, rows, tokens, low=0, unit=unit),
        HeatMap(top, "probability of the likeliest", rows, tokens, low=0, high=1, unit=unit),
    ]


def attribution_panels(found: "Attribution", what: str) -> "list[HeatMap]":
    import numpy as np

    layers = len(found.heads)
    if not layers:
        return []
    writers = {"attn_out": "attention"}
    if "blocks.0.mlp_out" in found.parts:
        writers["mlp_out"] = "MLP"
    parts = np.array([[found.parts[f"blocks.{i}.{name}"] for name in writers] for i in range(layers)])
    return [
        layer_map(parts, f"adds to {what}", [*writers.values()], centred=True, unit="logit"),
        layer_map(found.heads, "of this, each head", centred=True, unit="logit"),
    ]
