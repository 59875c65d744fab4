"""Measure a model without some of its heads or neurons.

Run the model on TEXT with heads and neurons set to 0, one at a time and all at once. Print how much the loss
rises and, with --answer, how the answer's logit changes. Without --head and --neuron, every head of the model
is removed in turn. With --repeated the text is random tokens, repeated once: induction heads lower the loss
on the second copy.
"""

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from lama.cli import AddVerb, inside
from lama.errors import UsageError, check_least

if TYPE_CHECKING:
    from lama.interp.pictures import HeatMap
    from lama.models.gpt import GPT
    from lama.shapes import Array
    from lama.tokenizers import Tokenizer

MOST = 1000  # draws


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("ablate", run, __doc__)
    parser.add_model(inside.MODEL)
    parser.add("text TEXT", "the text to predict; - reads standard input", nargs="?")
    repeated = "instead of TEXT: N random tokens, repeated once, with the loss on each copy"
    parser.add("--repeated N", repeated, type=int)
    add_places = partial(parser.add, type=layer_and_number, action="append")
    add_places("--head L.H", "head H of layer L, both from 0; can be repeated")
    add_places("--neuron L.N", "neuron N of layer L's MLP; can be repeated")
    parser.add("--mean", "set them to their mean over the text instead of 0")
    draws = "also remove as many other heads of the same layers, drawn at random N times, and print the mean"
    parser.add("--draws N", draws, 0)
    parser.add("--seed SEED", "the same seed gives the same random tokens and heads", 0)
    inside.add_answers(parser, required=False)
    inside.add_options(parser)


def layer_and_number(text: str) -> tuple[int, int]:
    """Parse `3.11`. Raises ArgumentTypeError."""
    layer, dot, number = text.partition(".")
    if not (dot and layer.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a layer and a number, as in 3.11; got {text!r}")
    return int(layer), int(number)


def run(args: argparse.Namespace) -> int:
    check_usage(args)
    model, tokenizer = inside.load(args)
    tokens = read_tokens(model, tokenizer, args)
    if len(tokens) < 2 and args.answer is None:
        raise UsageError("the loss needs at least two tokens; got one. Give a longer TEXT, or --answer")
    answer, against = inside.read_answers(tokenizer, args)
    from lama.interp.interventions import Removal, ablate, random_heads
    from lama.interp.labels import token_labels

    heads, neurons = tuple(args.head or ()), tuple(args.neuron or ())
    chosen = [Removal(heads=(head,)) for head in heads] + [Removal(neurons=(each,)) for each in neurons]
    if len(chosen) > 1:
        chosen.append(Removal(heads, neurons))
    c = model.config
    removals = chosen or [Removal(((i, h),)) for i in range(c.n_layers) for h in range(c.n_heads)]
    controls = [Removal(drawn) for drawn in random_heads(heads, c.n_heads, args.draws, args.seed)]
    found = ablate(model, tokens, [Removal(), *removals, *controls], args.mean, inside.watch)
    measured = losses(found.token_losses, args.repeated) if len(tokens) > 1 else {}
    if answer is not None:
        names = token_labels(tokenizer, [answer] if against is None else [answer, against])
        other = found.logits.mean(-1) if against is None else found.logits[:, against]
        measured[f"logit of {' above '.join(names)}"] = found.logits[:, answer] - other
    names = [str(removal) for removal in removals]
    if controls:
        n, last = len(controls[0].heads), 1 + len(removals)
        names.append(f"{n} other head{'s' if n > 1 else ''}, mean of {args.draws}")
        measured = {name: with_mean(values, last) for name, values in measured.items()}
    print(removal_table(measured, names) if chosen else head_tables(measured, c.n_heads))
    return inside.write_picture(args, panels(measured, names, c.n_heads if not chosen else 0))


def check_usage(args: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together."""
    if (args.text is None) == (args.repeated is None):
        raise UsageError("give either TEXT or --repeated N")
    if args.repeated is not None:
        check_least("repeated", args.repeated, 2)
        if args.answer is not None:
            raise UsageError("--answer needs TEXT; leave it out with --repeated")
    check_least("draws", args.draws, 0)
    check_least("seed", args.seed, 0)
    if args.draws > MOST:
        raise UsageError(f"draws must be at most {MOST:,}; got {args.draws}")
    if args.draws and not args.head:
        raise UsageError("--draws needs --head; got --draws alone")


def read_tokens(model: "GPT", tokenizer: "Tokenizer", args: argparse.Namespace) -> list[int]:
    """The tokens of TEXT or of --repeated. Raises LamaError where they do not fit the context."""
    if args.repeated is None:
        return inside.read_tokens(model, tokenizer, args.text)
    begin, context = inside.first_token(model, tokenizer), model.config.context_length
    if 2 * args.repeated + (begin is not None) > context:
        rule = f"twice as many tokens must fit context_length={context}"
        raise UsageError(f"--repeated is too large: {rule}; got {args.repeated}")
    from lama.interp.heads import repeated_tokens

    known = min(model.config.vocab_size, tokenizer.vocab_size)
    (row,) = repeated_tokens(1, args.repeated, known, begin, args.seed)
    return [int(token) for token in row]


def losses(by_token: "Array", repeated: int | None) -> "dict[str, Array]":
    """Mean losses (N,) of token losses (N, T - 1): of the text, or of the copies of random tokens.

    The second copy's first token is left out, since nothing predicts it.
    """
    if repeated is None:
        return {"loss": by_token.mean(-1)}
    return {
        "loss, first copy": by_token[:, :-repeated].mean(-1),
        "loss, second copy": by_token[:, 1 - repeated :].mean(-1),
    }


def with_mean(values: "Array", n: int) -> "Array":
    """The first n values, then the mean of the others."""
    import numpy as np

    return np.append(values[:n], values[n:].mean())


def removal_table(measured: "dict[str, Array]", names: "list[str]") -> str:
    from lama.tables import Table

    columns, rows = ["without"], [["nothing"], *([name] for name in names)]
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


def panels(measured: "dict[str, Array]", names: "list[str]", n_heads: int) -> "list[HeatMap]":
    """Heat maps of the changes: layers by heads if each head was removed, else a row for each removal."""
    import numpy as np

    from lama.interp.pictures import HeatMap

    found, changes = [], {name: values[1:] - values[0] for name, values in measured.items()}
    of_losses = [change for name, change in changes.items() if name.startswith("loss")]
    shared = HeatMap(np.stack(of_losses), centred=True).limits() if of_losses else (None, None)
    for name, change in changes.items():
        low, high = shared if name.startswith("loss") else (None, None)
        scale: dict[str, Any] = {"centred": True, "low": low, "high": high}
        title = f"change of {name}"
        if n_heads:
            found.append(inside.layer_map(change.reshape(-1, n_heads), title, x="without head", **scale))
        else:
            found.append(HeatMap(change[:, None], title, names, [""], **scale))
    return found
