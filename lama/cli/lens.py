"""`lama lens`: what a model would say after each of its layers, and which of its parts make it say what it says."""

import argparse
from typing import TYPE_CHECKING, Any

from lama.cli.inside import (
    add_answers,
    add_model,
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

SHOWN = 4  # likeliest tokens


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "lens",
        help="see what a model would say after each layer",
        description="After each layer, give the stream to the final norm and the unembedding: the likeliest tokens after PROMPT, and the "
        "rank and probability of the answer. With --answer also how much each layer's attention and MLP, and each head, add to the "
        "answer's logit, above that of the token --against, or above the mean of all.",
    )
    parser.set_defaults(run=run)
    add_model(parser)
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
        except LamaError as error:  # its parts do not add up; the lens is there all the same
            note(f"no attribution: {error}")
            return write_picture(args, panels)
        what = f"{names[0]} above {names[1] if against is not None else 'the mean of all tokens'}"
        print(f"\n{attribution_table(found, what)}")
        panels += attribution_panels(found, what)
    return write_picture(args, panels)


def stages(lens: "Lens") -> list[str]:
    return ["embedding", *(f"layer {i}" for i in range(len(lens.rank) - 1))]


def lens_table(lens: "Lens", answer: str, tokenizer: Any) -> str:
    """What could be read from the stream after the prompt's last token."""
    from lama.experiments.report import Table
    from lama.interp.labels import token_labels

    rows = []
    for stage, top, probabilities, rank, probability in zip(
        stages(lens), lens.top[:, -1], lens.top_probability[:, -1], lens.rank[:, -1], lens.probability[:, -1], strict=True
    ):
        likeliest = [f"{label} {p:.1%}" for label, p in zip(token_labels(tokenizer, top), probabilities, strict=True)]
        rows.append([stage, *likeliest, f"{rank:,}", f"{probability:.2%}"])
    return str(Table(["after", *["likeliest", *[""] * (lens.top.shape[-1] - 1)], f"rank of {answer}", f"probability of {answer}"], rows))


def attribution_table(found: "Attribution", what: str) -> str:
    """The parts that add up to the logit difference, and the heads in them."""
    from lama.experiments.report import Table

    rows = [[name, f"{value:+.3f}"] for name, value in found.parts.items()]
    total = sum(found.parts.values())
    parts = Table([what, "adds"], [*rows, ["together", f"{total:+.3f}"], ["the model's logits", f"{found.difference:+.3f}"]])
    if not len(found.heads):
        return str(parts)
    return f"{parts}\n\n{head_table('by head', found.heads)}"


def lens_panels(lens: "Lens", answer: str, tokens: list[str]) -> "list[HeatMap]":
    from lama.interp.pictures import HeatMap

    rows, title = stages(lens), f"probability of {answer}"
    return [
        HeatMap(lens.probability[::-1], title, rows[::-1], tokens, low=0, unit="probability"),
        HeatMap(lens.top_probability[::-1, :, 0], "probability of the likeliest", rows[::-1], tokens, low=0, high=1, unit="probability"),
    ]


def attribution_panels(found: "Attribution", what: str) -> "list[HeatMap]":
    import numpy as np

    layers = len(found.heads)
    if not layers:
        return []
    writers = {"attn_out": "attention", "mlp_out": "MLP"} if "blocks.0.mlp_out" in found.parts else {"attn_out": "attention"}
    parts = np.array([[found.parts[f"blocks.{i}.{name}"] for name in writers] for i in range(layers)])
    return [
        layer_map(parts, f"adds to {what}", [*writers.values()], centred=True, unit="logit"),
        layer_map(found.heads, "of this, each head", centred=True, unit="logit"),
    ]
