"""`lama patch`: which of a model's activations carry what tells two prompts apart."""

import argparse
from typing import TYPE_CHECKING, Any

from lama.cli.inside import (
    add_answers,
    add_model,
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

if TYPE_CHECKING:
    from lama.interp.interventions import Patching
    from lama.interp.pictures import HeatMap

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")  # lama.interp's; spelled out, so that --help stays light


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "patch",
        help="see which activations carry what tells two prompts apart",
        description="Run the model on the corrupted prompt with one activation at a time taken from its run on the clean one, and measure "
        "the logit of the answer above that of the token --against after the last token: 0 is the corrupted run, 1 the clean one. Both "
        "prompts must have equally many tokens.",
    )
    parser.set_defaults(run=run)
    add_model(parser)
    parser.add_argument("clean", metavar="CLEAN", help="the prompt that --answer follows")
    parser.add_argument("corrupted", metavar="CORRUPTED", help="the same prompt with something changed")
    add_answers(parser, required=True)
    parser.add_argument(
        "--site",
        choices=SITES,
        default="resid_pre",
        help="what is patched: the stream before a block, between its attention and MLP, or after it, what attention or MLP adds, each at "
        "one position; or what a head hands on (z), at all positions (default resid_pre)",
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    model, tokenizer = load(args)
    clean, corrupted = (read_tokens(model, tokenizer, text) for text in (args.clean, args.corrupted))
    answer, against = read_answer(tokenizer, args.answer), read_answer(tokenizer, args.against)
    assert answer is not None and against is not None
    from lama.interp.interventions import patch
    from lama.interp.labels import token_labels

    found = patch(model, clean, corrupted, answer, against, args.site, watch)
    first, second = token_labels(tokenizer, [answer, against])
    print(f"logit of {first} above {second}: clean {found.clean:+.3f}, corrupted {found.corrupted:+.3f}\n")
    names = places(token_labels(tokenizer, clean), token_labels(tokenizer, corrupted))
    print(table(found, names))
    return write_picture(args, [panel(found, names, f"{args.site}: effect on {first} above {second}")])


def places(clean: list[str], corrupted: list[str]) -> list[str]:
    """The prompts' tokens with their positions, both where they differ."""
    return [f"{i} {a}" if a == b else f"{i} {a} / {b}" for i, (a, b) in enumerate(zip(clean, corrupted, strict=True))]


def table(found: "Patching", names: list[str]) -> str:
    """A row for each position and a column for each layer; of heads, a row for each layer."""
    if found.site == "z":
        return head_table("head", found.effect)
    return matrix_table(f"{found.site} of layer", found.effect.T, names, [str(i) for i in range(len(found.effect))])


def panel(found: "Patching", names: list[str], title: str) -> "HeatMap":
    columns = None if found.site == "z" else names
    return layer_map(found.effect, title, columns, centred=True, unit="0 corrupted, 1 clean")
