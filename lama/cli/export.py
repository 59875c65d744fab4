"""Write a model in Hugging Face's format.

Write a model as a folder that transformers loads with equal logits.
"""

import argparse
from pathlib import Path

from lama.cli import AddVerb, machine
from lama.cli.out import own_folder


def add_parser(add_verb: AddVerb) -> None:
    usage = "%(prog)s -m MODEL [--to hf] DIR [--dtype DTYPE] [--offline] [--tokenizer NAME]"
    parser = add_verb("export", run, __doc__, usage=usage)
    parser.add_model()
    parser.add("out DIR", "a new or empty folder", type=Path)
    parser.add("--to", "the format: hf, Hugging Face's GPT-2 (default)", "hf", choices=("hf",))
    parser.add("--dtype", "precision of the weights", "float32", choices=machine.FLOATS)
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
        ids = "token ids are positions in the sorted alphabet of its config.json"
        print(f"its character tokenizer has no Hugging Face form: {ids}")
    return 0
