"""Measure a model without some of its heads or neurons.

Run the model on TEXT with heads and neurons set to 0, one at a time and all at once. Prints the rise of the
loss and, with --answer, the change of the answer's logit. Without --head and --neuron, every head of the
model is removed in turn.
"""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from lama.cli import AddVerb, inside
from lama.errors import UsageError

if TYPE_CHECKING:
    from lama.interp.interventions import Removal
    from lama.interp.pictures import HeatMap
    from lama.shapes import Array


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("ablate", run, __doc__)
    parser.add_model(inside.MODEL)
    parser.add("text TEXT", "the text to predict; - reads standard input")
    add_places = partial(parser.add, type=layer_and_number, action="append")
    add_places("--head L.H", "head H of layer L, both from 0; can be repeated")
    add_places("--neuron L.N", "neuron N of layer L's MLP; can be repeated")
    parser.add("--mean", "set them to their mean over the text instead of 0")
    inside.add_answers(parser, required=False)
    inside.add_options(parser)


def layer_and_number(text: str) -> tuple[int, int]:
    """Parse `3.11`. Raises ArgumentTypeError."""
    layer, dot, number = text.partition(".")
    if not (dot and layer.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a layer and a number, as in 3.11; got {text!r}")
    return int(layer), int(number)


def run(args: argparse.Namespace) -> int:
    model, tokenizer = inside.load(args)
    tokens = inside.read_tokens(model, tokenizer, args.text)
    if len(tokens) < 2 and args.answer is None:
        raise UsageError("the loss needs at least two tokens; got one. Give a longer TEXT, or --answer")
    answer, against = inside.read_answers(tokenizer, args)
    from lama.interp.interventions import Removal, ablate
    from lama.interp.labels import token_labels

    heads, neurons = tuple(args.head or ()), tuple(args.neuron or ())
    chosen = [Removal(heads=(head,)) for head in heads] + [Removal(neurons=(each,)) for each in neurons]
    if len(chosen) > 1:
        chosen.append(Removal(heads, neurons))
    c = model.config
    removals = chosen or [Removal(((i, h),)) for i in range(c.n_layers) for h in range(c.n_heads)]
    found = ablate(model, tokens, [Removal(), *removals], args.mean, inside.watch)
    measured = {"loss": found.losses} if len(tokens) > 1 else {}
    if answer is not None:
        names = token_labels(tokenizer, [answer] if against is None else [answer, against])
        other = found.logits.mean(-1) if against is None else found.logits[:, against]
        measured[f"logit of {' above '.join(names)}"] = found.logits[:, answer] - other
    print(removal_table(measured, removals) if chosen else head_tables(measured, c.n_heads))
    return inside.write_picture(args, panels(measured, removals, c.n_heads if not chosen else 0))


def removal_table(measured: "dict[str, Array]", removals: "list[Removal]") -> str:
    from lama.tables import Table

    columns, rows = ["without"], [["nothing"], *([str(removal)] for removal in removals)]
    for name, values in measured.items():
        columns += [name, "change"]
        for row, value in zip(rows, values, strict=True):
            row += [f"{value:.4f}", f"{value - values[0]:+.4f}"]
        rows[0][-1] = ""
    return str(Table(columns, rows))


def head_tables(measured: "dict[str, Array]", n_heads: int) -> str:
    tables = []
    for name, values in measured.items():
        table = inside.head_table("without head", (values[1:] - values[0]).reshape(-1, n_heads))
        tables.append(f"{name}: {values[0]:.4f}, and its change\n{table}")
    return "\n\n".join(tables)


def panels(measured: "dict[str, Array]", removals: "list[Removal]", n_heads: int) -> "list[HeatMap]":
    """Heat maps of layers by heads if each head was removed, else with a row for each removal."""
    from lama.interp.pictures import HeatMap

    names, found = [str(removal) for removal in removals], []
    for name, values in measured.items():
        change, title = values[1:] - values[0], f"change of {name}"
        if n_heads:
            found.append(inside.layer_map(change.reshape(-1, n_heads), title, x="without head", centred=True))
        else:
            found.append(HeatMap(change[:, None], title, names, [""], centred=True))
    return found
