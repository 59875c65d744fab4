"""`lama patch`: find the activations of a model that carry the difference between two prompts."""

import argparse
from typing import TYPE_CHECKING

from lama.cli import Verbs
from lama.cli.inside import (
    GPT_MODEL,
    add_answers,
    add_options,
    head_table,
    layer_map,
    load,
    matrix_table,
    read_answer,
    read_tokens,
    watch,
    write_picture,
)
from lama.interp import SITES

if TYPE_CHECKING:
    from lama.interp.interventions import Patching
    from lama.interp.pictures import HeatMap


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "patch",
        help="find the activations that carry the difference between two prompts",
        description="Run the model on the corrupted prompt with one activation at a time from its run on the "
        "clean prompt, and measure the logit of the answer above that of the token --against after the last "
        "token: 0 is the corrupted run, 1 the clean run. Both prompts must have equally many tokens.",
    )
    parser.set_defaults(run=run)
    parser.add_model(GPT_MODEL)
    parser.add_argument("clean", metavar="CLEAN", help="the prompt that --answer follows")
    parser.add_argument("corrupted", metavar="CORRUPTED", help="the same prompt with something changed")
    add_answers(parser, required=True)
    parser.add_argument(
        "--site",
        choices=SITES,
        default="resid_pre",
        help="the patched activation: the stream before, inside or after a block, or the output of attention "
        "or MLP, each at one position; or a head's output (z) at all positions (default resid_pre)",
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    model, tokenizer = load(args)
    clean = read_tokens(model, tokenizer, args.clean)
    corrupted = read_tokens(model, tokenizer, args.corrupted)
    answer, against = read_answer(tokenizer, args.answer), read_answer(tokenizer, args.against)
    assert answer is not None and against is not None
    from lama.interp.interventions import patch
    from lama.interp.labels import token_labels

    found = patch(model, clean, corrupted, answer, against, args.site, watch)
    first, second = token_labels(tokenizer, [answer, against])
    print(f"logit of {first} above {second}: clean {found.clean:+.3f}, corrupted {found.corrupted:+.3f}\n")
    names = position_labels(token_labels(tokenizer, clean), token_labels(tokenizer, corrupted))
    print(table(found, names))
    return write_picture(args, [panel(found, names, f"{args.site}: effect on {first} above {second}")])


def position_labels(clean: list[str], corrupted: list[str]) -> list[str]:
    """The prompts' tokens with their positions, both where they differ."""
    pairs = enumerate(zip(clean, corrupted, strict=True))
    return [f"{i} {a}" if a == b else f"{i} {a} / {b}" for i, (a, b) in pairs]


def table(found: "Patching", names: list[str]) -> str:
    """A table of positions by layers; for the site z, of layers by heads."""
    if found.site == "z":
        return head_table("head", found.effect)
    layers = [str(i) for i in range(len(found.effect))]
    return matrix_table(f"{found.site} of layer", found.effect.T, names, layers)


def panel(found: "Patching", names: list[str], title: str) -> "HeatMap":
    columns = None if found.site == "z" else names
    return layer_map(found.effect, title, columns, centred=True, unit="0 corrupted, 1 clean")
