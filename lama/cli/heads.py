"""`lama heads`: what each head of a model does on repeated random tokens, and what it copies."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli.inside import add_model, add_options, head_table, layer_map, load, write_picture
from lama.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from lama.interp.pictures import HeatMap
    from lama.interp.published import KnownHeads

MEASURES = ("mass", "mul", "abs")  # lama.interp.heads's; spelled out, so that --help stays light
LENGTH, BEST, MOST = 50, 5, 1000


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "heads",
        help="see what each head of a model does",
        description="Let the model read random tokens twice over, and say of each head how much it looks at the token before "
        "(previous-token), at the same token's earlier place (duplicate-token), and at what came after that (induction); and, from its "
        "weights alone, how much looking at a token makes that token likelier (copying: from -1 to 1, the eigenvalues of its OV circuit). "
        "For gpt2, what others found stands below.",
    )
    parser.set_defaults(run=run)
    add_model(parser)
    add = parser.add_argument
    add("--length", type=int, metavar="N", help=f"random tokens, repeated once (default {LENGTH}, or what fits)")
    add("--sequences", type=int, default=4, metavar="N", help="how many times others (default 4)")
    add("--seed", type=int, default=0, help="the same seed gives the same tokens (default 0)")
    add(
        "--measure",
        choices=MEASURES,
        default="mass",
        help="mass: the share of attention, over queries that have such a key (default); mul: over all queries; abs: 1 less the difference "
        "from a pattern that does nothing else. mul and abs are TransformerLens's",
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    for name, least in (("length", 2), ("sequences", 1), ("seed", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UsageError(f"{name} must be at least {least}; got {value}")
    if args.sequences > MOST:
        raise UsageError(f"sequences must be at most {MOST:,}, which are read at once; got {args.sequences}")
    model, tokenizer = load(args)
    begin = tokenizer.end_of_text
    begin = None if begin is None or begin >= model.config.vocab_size else begin
    fits = (model.config.context_length - (begin is not None)) // 2
    length = min(LENGTH, fits) if args.length is None else args.length
    if not 2 <= length <= fits:
        raise UsageError(f"length must be such that twice as many tokens fit context_length={model.config.context_length}; got {length}")
    from lama.interp.heads import head_scores
    from lama.interp.published import known_heads

    found = head_scores(model, length, args.sequences, begin, args.seed, args.measure, tokenizer.vocab_size)
    scores = {"previous-token": found.previous_token, "duplicate-token": found.duplicate_token, "induction": found.induction}
    if found.copying is not None:
        scores["copying"] = found.copying
    after = "" if begin is None else "after the end-of-text token, "
    print(f"{model.describe()}\n{args.sequences} times {length} random tokens, twice over, {after}seed {args.seed}\n")
    print("\n\n".join(f"{head_table(name, values)}\nhighest: {best(values)}" for name, values in scores.items()))
    if known := known_heads(Path(args.model).name, model):
        print(f"\n{known_table(known, scores)}")
    return write_picture(args, [panel(name, values) for name, values in scores.items()])


def best(values: "np.ndarray") -> str:
    """The heads with the highest scores: `5.1 0.93, ...`."""
    n_heads = values.shape[1]
    order = (-values).ravel().argsort(kind="stable")[:BEST]
    return ", ".join(f"{i // n_heads}.{i % n_heads} {values.flat[i]:.3f}" for i in order)


def known_table(known: "tuple[KnownHeads, ...]", scores: "dict[str, np.ndarray]") -> str:
    """What others found, each head beside its scores here, and where they say so."""
    from lama.experiments.report import Table

    sources = list(dict.fromkeys(group.source for group in known))
    rows = []
    for group in known:
        for i, head in enumerate(group.heads):
            published = f"{group.scores[i]:.3f}" if group.scores else ""
            here = (f"{values[head]:.3f}" for values in scores.values())
            rows.append([f"{head[0]}.{head[1]}", group.role, published, *here, f"[{sources.index(group.source) + 1}]"])
    listed = "\n".join(f"[{i}] {source}" for i, source in enumerate(sources, 1))
    return f"{Table(['GPT-2 small', 'known as', 'published', *scores, 'by'], rows)}\n\n{listed}"


def panel(name: str, values: "np.ndarray") -> "HeatMap":
    signed = name == "copying" or bool((values < 0).any())
    return layer_map(values, name, centred=signed, low=-1.0 if signed else 0.0, high=1.0)
