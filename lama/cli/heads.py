"""Score each head of a model.

Run the model on random tokens that are repeated once, and print where each head's attention is: on the token
before (previous-token), on the same token's earlier position (duplicate-token), or on the token after that
(induction). Copying is computed from the weights alone. It says how much attention to a token makes that
token likelier, from -1 to 1 (eigenvalues of the OV circuit). For gpt2, published heads are listed below.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, inside
from lama.errors import UsageError, check_least
from lama.interp import MEASURES

if TYPE_CHECKING:
    from lama.interp.published import KnownHeads
    from lama.shapes import Array

LENGTH, BEST, MOST = 50, 5, 1000


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("heads", run, __doc__)
    parser.add_model(inside.MODEL)
    add = parser.add
    add("--length N", f"random tokens, repeated once (default {LENGTH}, or as many as fit)", type=int)
    add("--sequences N", "number of sequences", 4)
    add("--seed SEED", "the same seed gives the same tokens", 0)
    measures = (
        "mass: the share of attention, over queries that have such a key (default); mul: over all queries; "
        "abs: 1 - the difference from an ideal pattern. mul and abs are TransformerLens's"
    )
    add("--measure", measures, "mass", choices=MEASURES)
    inside.add_options(parser)


def run(args: argparse.Namespace) -> int:
    for name, least in (("length", 2), ("sequences", 1), ("seed", 0)):
        check_least(name, getattr(args, name), least)
    if args.sequences > MOST:
        raise UsageError(f"sequences must be at most {MOST:,}; got {args.sequences}")
    model, tokenizer = inside.load(args)
    begin, context = inside.first_token(model, tokenizer), model.config.context_length
    fits = (context - (begin is not None)) // 2
    length = min(LENGTH, fits) if args.length is None else args.length
    if not 2 <= length <= fits:
        rule = f"at least 2, and twice as many tokens must fit context_length={context}"
        raise UsageError(f"length must be {rule}; got {length}")
    from lama.interp.heads import head_scores
    from lama.interp.published import known_heads
    from lama.models.registry import describe

    found = head_scores(model, length, args.sequences, begin, args.seed, args.measure, tokenizer.vocab_size)
    scores = {
        "previous-token": found.previous_token,
        "duplicate-token": found.duplicate_token,
        "induction": found.induction,
    }
    if found.copying is not None:
        scores["copying"] = found.copying
    after = "" if begin is None else "after the end-of-text token, "
    tokens = f"{args.sequences} times {length} random tokens, repeated once"
    print(f"{describe(model)}\n{tokens}, {after}seed {args.seed}\n")
    tables = [
        f"{inside.head_table(name, values)}\nhighest: {best(values)}" for name, values in scores.items()
    ]
    print("\n\n".join(tables))
    if known := known_heads(Path(args.model).name, model):
        print(f"\n{known_table(known, scores)}")
    panels = []
    for name, values in scores.items():
        signed = name == "copying" or bool((values < 0).any())
        low = -1.0 if signed else 0.0
        panels.append(inside.layer_map(values, name, centred=signed, low=low, high=1.0))
    return inside.write_picture(args, panels)


def best(values: "Array") -> str:
    """The heads with the highest scores: `5.1 0.93, ...`."""
    n_heads = values.shape[1]
    order = (-values).ravel().argsort(kind="stable")[:BEST]
    return ", ".join(f"{i // n_heads}.{i % n_heads} {values.flat[i]:.3f}" for i in order)


def known_table(known: "tuple[KnownHeads, ...]", scores: "dict[str, Array]") -> str:
    from lama.tables import Table

    sources = list(dict.fromkeys(group.source for group in known))
    rows = []
    for group in known:
        source = f"[{sources.index(group.source) + 1}]"
        for i, head in enumerate(group.heads):
            published = f"{group.scores[i]:.3f}" if group.scores else ""
            here = [f"{values[head]:.3f}" for values in scores.values()]
            rows.append([f"{head[0]}.{head[1]}", group.role, published, *here, source])
    listed = "\n".join(f"[{i}] {source}" for i, source in enumerate(sources, 1))
    return f"{Table(['GPT-2 small', 'known as', 'published', *scores, 'by'], rows)}\n\n{listed}"
