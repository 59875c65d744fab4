"""`lama export`: write a model in another format."""

import argparse
from pathlib import Path

from lama.cli import Verbs, machine
from lama.cli.out import own_folder


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "export",
        help="write a model in Hugging Face's format",
        usage="%(prog)s -m MODEL [--to hf] DIR [--dtype DTYPE] [--offline] [--tokenizer NAME]",
        description="Write a model as a folder that transformers loads with equal logits.",
    )
    parser.set_defaults(run=run)
    parser.add_model()
    add = parser.add_argument
    add("out", type=Path, metavar="DIR", help="a new or empty folder")
    add("--to", choices=("hf",), default="hf", help="the format: hf, Hugging Face's GPT-2 (default)")
    add(
        "--dtype",
        choices=machine.FLOATS,
        default="float32",
        help="precision of the weights (default float32)",
    )
    machine.add_finding(parser)


def run(args: argparse.Namespace) -> int:
    with own_folder(args.out, None, "export", what="DIR"):
        return export(args)


def export(args: argparse.Namespace) -> int:
    from lama.checkpoints import export_huggingface, load_causal

    model, tokenizer = load_causal(args.model, **machine.loading(args))
    names = export_huggingface(args.out, model, tokenizer)
    print(f"saved in {args.out}: {', '.join(names)}")
    if not {"tokenizer.json", "vocab.json", "vocab.txt"} & {*names}:
        print(
            "its character tokenizer has no Hugging Face form: token ids are positions in the sorted "
            "alphabet of its config.json"
        )
    return 0
