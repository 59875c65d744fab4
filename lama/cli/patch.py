"""Find the activations that carry the difference between two prompts.

Run the model on the corrupted prompt, each time with one activation replaced by that of the clean prompt. The
effect is measured after the last token, by the logit of --answer minus that of --against: 0 is the corrupted
run, 1 the clean run. Both prompts must have equally many tokens.
"""

import argparse

from lama.cli import AddVerb, inside
from lama.interp import SITES


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("patch", run, __doc__)
    parser.add_model(inside.MODEL)
    parser.add("clean CLEAN", "the prompt that --answer follows")
    parser.add("corrupted CORRUPTED", "the same prompt with something changed")
    inside.add_answers(parser, required=True)
    sites = (
        "the patched activation: the stream before, inside or after a block, or the output of attention or "
        "MLP, each at one position; or a head's output (z) at all positions"
    )
    parser.add("--site", sites, "resid_pre", choices=SITES)
    inside.add_options(parser)


def run(args: argparse.Namespace) -> int:
    model, tokenizer = inside.load(args)
    clean = inside.read_tokens(model, tokenizer, args.clean)
    corrupted = inside.read_tokens(model, tokenizer, args.corrupted)
    answer, against = inside.read_answers(tokenizer, args)
    assert answer is not None and against is not None
    from lama.interp.interventions import patch
    from lama.interp.labels import token_labels

    found = patch(model, clean, corrupted, answer, against, args.site, inside.watch)
    first, second = token_labels(tokenizer, [answer, against])
    print(f"logit of {first} above {second}: clean {found.clean:+.3f}, corrupted {found.corrupted:+.3f}\n")
    names = position_labels(token_labels(tokenizer, clean), token_labels(tokenizer, corrupted))
    title = f"{args.site}: effect on {first} above {second}"
    if args.site == "z":
        print(inside.head_table("head", found.effect))
    else:
        layers = [str(i) for i in range(len(found.effect))]
        print(inside.matrix_table(f"{args.site} of layer", found.effect.T, names, layers))
    columns, unit = None if args.site == "z" else names, "0 corrupted, 1 clean"
    panel = inside.layer_map(found.effect, title, columns, centred=True, unit=unit)
    return inside.write_picture(args, [panel])


def position_labels(clean: list[str], corrupted: list[str]) -> list[str]:
    """The prompts' tokens with their positions, both where they differ."""
    pairs = enumerate(zip(clean, corrupted, strict=True))
    return [f"{i} {a}" if a == b else f"{i} {a} / {b}" for i, (a, b) in pairs]
