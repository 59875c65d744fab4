"""Show a model's predictions after each layer.

Apply the final norm and the unembedding to the residual stream after each layer. Print the likeliest next
tokens after PROMPT, and the rank and probability of the answer. With --answer, also print what each layer's
attention and MLP, and each head, add to the answer's logit. It is measured above the logit of --against, or
above the mean of all logits.
"""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from lama.cli import AddVerb, inside
from lama.errors import LamaError, note

if TYPE_CHECKING:
    from lama.interp.lens import Attribution, Lens
    from lama.interp.pictures import HeatMap
    from lama.tokenizers import Tokenizer

SHOWN = 4  # likeliest tokens


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("lens", run, __doc__)
    parser.add_model(inside.MODEL)
    parser.add("text PROMPT", "the text to continue; - reads standard input")
    inside.add_answers(parser, required=False)
    inside.add_options(parser)


def run(args: argparse.Namespace) -> int:
    model, tokenizer = inside.load(args)
    tokens = inside.read_tokens(model, tokenizer, args.text)
    answer, against = inside.read_answers(tokenizer, args)
    from lama.interp.labels import token_labels
    from lama.interp.lens import attribute, logit_lens

    lens = logit_lens(model, tokens, answer, SHOWN)
    names = token_labels(tokenizer, [lens.answer] if against is None else [lens.answer, against])
    print(lens_table(lens, names[0], tokenizer))
    panels = lens_panels(lens, names[0], token_labels(tokenizer, tokens))
    if answer is not None:
        try:
            found = attribute(model, tokens, answer, against)
        except LamaError as error:  # of a model whose parts do not add up; the lens still works
            note(f"no attribution: {error}")
            return inside.write_picture(args, panels)
        what = f"{names[0]} above {names[1] if against is not None else 'the mean of all tokens'}"
        print(f"\n{attribution_table(found, what)}")
        panels += attribution_panels(found, what)
    return inside.write_picture(args, panels)


def stages(lens: "Lens") -> list[str]:
    return ["embedding", *(f"layer {i}" for i in range(len(lens.rank) - 1))]


def lens_table(lens: "Lens", answer: str, tokenizer: "Tokenizer") -> str:
    from lama.interp.labels import token_labels
    from lama.tables import Table

    rows = []
    for i, stage in enumerate(stages(lens)):
        likeliest = zip(token_labels(tokenizer, lens.top[i, -1]), lens.top_probability[i, -1], strict=True)
        cells = [f"{label} {p:.1%}" for label, p in likeliest]
        rows.append([stage, *cells, f"{lens.rank[i, -1]:,}", f"{lens.probability[i, -1]:.2%}"])
    blank = [""] * (lens.top.shape[-1] - 1)
    columns = ["after", "likeliest", *blank, f"rank of {answer}", f"probability of {answer}"]
    return str(Table(columns, rows))


def attribution_table(found: "Attribution", what: str) -> str:
    from lama.tables import Table

    values = {**found.parts, "sum": sum(found.parts.values()), "the model's logits": found.difference}
    parts = Table([what, "adds"], [[name, f"{value:+.3f}"] for name, value in values.items()])
    if not len(found.heads):
        return str(parts)
    return f"{parts}\n\n{inside.head_table('by head', found.heads)}"


def lens_panels(lens: "Lens", answer: str, tokens: list[str]) -> "list[HeatMap]":
    from lama.interp.pictures import HeatMap

    draw = partial(HeatMap, rows=stages(lens)[::-1], columns=tokens, low=0, unit="probability")
    top = lens.top_probability[::-1, :, 0]
    right = draw(lens.probability[::-1], f"probability of {answer}")
    return [right, draw(top, "probability of the likeliest", high=1)]


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
        inside.layer_map(parts, f"adds to {what}", [*writers.values()], centred=True, unit="logit"),
        inside.layer_map(found.heads, "contribution of each head", centred=True, unit="logit"),
    ]
