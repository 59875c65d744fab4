"""`lama export`: hand a model over in another format."""

import argparse
from pathlib import Path
from typing import Any

from lama.cli.machine import FLOATS


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "export",
        help="write a model in Hugging Face's format",
        usage="%(prog)s MODEL [--to hf] DIR [--dtype DTYPE] [--offline] [-v]",
        description="Write a model as a folder that transformers loads with equal logits.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, a folder or a file, as for lama generate")
    add("out", type=Path, metavar="DIR", help="a new or empty folder")
    add("--to", choices=("hf",), default="hf", help="the format: hf, Hugging Face's GPT-2 (default)")
    add("--dtype", choices=FLOATS, default="float32", help="precision of the weights (default float32)")
    add("--offline", action="store_true", help="use only what is on this machine")
    add("-v", "--verbose", action="store_true", help="show tracebacks")


def run(args: argparse.Namespace) -> int:
    from lama.checkpoints import export_huggingface, load_gpt
    from lama.errors import UsageError

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"DIR must be a new or empty folder; got {args.out}")
    model, tokenizer = load_gpt(args.model, dtype=args.dtype, offline=args.offline)
    names = export_huggingface(args.out, model, tokenizer)
    print(f"saved in {args.out}: {', '.join(names)}")
    if "vocab.json" not in names and "tokenizer.json" not in names:
        print("its character tokenizer has no Hugging Face form: token ids are places in the sorted alphabet of its config.json")
    return 0
