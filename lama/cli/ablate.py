"""`lama ablate`: what a model loses without some of its heads or neurons."""

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
    watch,
    write_picture,
)
from lama.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from lama.interp.interventions import Ablation, Removal
    from lama.interp.pictures import HeatMap


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "ablate",
        help="see what a model loses without some of its heads or neurons",
        description="Run the model on TEXT with heads and neurons set to 0, each for itself and all together: how much higher the loss is "
        "and, with --answer, how the answer's logit changes. Without --head and --neuron, every head of the model in turn.",
    )
    parser.set_defaults(run=run)
    add_model(parser)
    add = parser.add_argument
    add("text", metavar="TEXT", help="the text whose tokens are to be predicted; - reads standard input")
    add("--head", type=layer_and_number, action="append", default=[], metavar="L.H", help="head H of layer L, both from 0; can be repeated")
    add("--neuron", type=layer_and_number, action="append", default=[], metavar="L.N", help="neuron N of layer L's MLP; can be repeated")
    add("--mean", action="store_true", help="set them to their mean over the text, in place of 0")
    add_answers(parser, required=False)
    add_options(parser)


def layer_and_number(text: str) -> tuple[int, int]:
    layer, dot, number = text.partition(".")
    if not (dot and layer.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a layer and a number, as in 3.11; got {text!r}")
    return int(layer), int(number)


def run(args: argparse.Namespace) -> int:
    check_against(args)
    model, tokenizer = load(args)
    tokens = read_tokens(model, tokenizer, args.text)
    if len(tokens) < 2 and args.answer is None:
        raise UsageError("TEXT must have at least two tokens, or --answer be given; got one token, of which there is no loss")
    answer, against = read_answer(tokenizer, args.answer), read_answer(tokenizer, args.against)
    from lama.interp.interventions import Removal, ablate
    from lama.interp.labels import token_labels

    chosen = [Removal(heads=(head,)) for head in args.head] + [Removal(neurons=(neuron,)) for neuron in args.neuron]
    if len(chosen) > 1:
        chosen.append(Removal(tuple(args.head), tuple(args.neuron)))
    c = model.config
    removals = chosen or [Removal(heads=((layer, head),)) for layer in range(c.n_layers) for head in range(c.n_heads)]
    found = ablate(model, tokens, [Removal(), *removals], args.mean, watch)
    measured = {"loss": found.losses} if len(tokens) > 1 else {}
    if answer is not None:
        names = token_labels(tokenizer, [answer] if against is None else [answer, against])
        measured[f"logit of {' above '.join(names)}"] = logits_of(found, answer, against)
    print(removal_table(measured, removals) if chosen else head_tables(measured, c.n_heads))
    return write_picture(args, panels(measured, removals, c.n_heads if not chosen else 0))


def logits_of(found: "Ablation", answer: int, against: int | None) -> "np.ndarray":
    """(N,): the answer's logit after the last token, above the other's or the mean of all."""
    other = found.logits.mean(-1) if against is None else found.logits[:, against]
    values: np.ndarray = found.logits[:, answer] - other
    return values


def removal_table(measured: "dict[str, np.ndarray]", removals: "list[Removal]") -> str:
    """A row for each removal."""
    from lama.experiments.report import Table

    columns = [column for name in measured for column in (name, "change")]
    rows = [["nothing", *(cell for values in measured.values() for cell in (f"{values[0]:.4f}", ""))]]
    for i, removal in enumerate(removals, 1):
        cells = ((f"{values[i]:.4f}", f"{values[i] - values[0]:+.4f}") for values in measured.values())
        rows.append([str(removal), *(cell for pair in cells for cell in pair)])
    return str(Table(["without", *columns], rows))


def head_tables(measured: "dict[str, np.ndarray]", n_heads: int) -> str:
    """What changes without each head: layer by head."""
    tables = []
    for name, values in measured.items():
        table = head_table("without head", (values[1:] - values[0]).reshape(-1, n_heads))
        tables.append(f"{name}: {values[0]:.4f}, and its change\n{table}")
    return "\n\n".join(tables)


def panels(measured: "dict[str, np.ndarray]", removals: "list[Removal]", n_heads: int) -> "list[HeatMap]":
    """Layer by head where each head was removed, else a row for each removal."""
    from lama.interp.pictures import HeatMap

    found = []
    for name, values in measured.items():
        change, title = values[1:] - values[0], f"change of {name}"
        if n_heads:
            found.append(layer_map(change.reshape(-1, n_heads), title, x="without head", centred=True))
        else:
            found.append(HeatMap(change[:, None], title, [str(removal) for removal in removals], [""], centred=True))
    return found
