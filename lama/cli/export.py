"""Write a model in Hugging Face's format, or as a GGUF file.

Write a model as a folder that transformers loads with equal logits, or as a file that llama.cpp reads.
"""

import argparse
import os
from pathlib import Path

from lama.cli import AddVerb, machine
from lama.cli.out import own_folder
from lama.errors import UsageError
from lama.files import quoted_path


def add_parser(add_verb: AddVerb) -> None:
    usage = (
        "%(prog)s -m MODEL [--to hf|gguf] OUT [--dtype DTYPE] [--adapter DIR] [--offline] [--tokenizer NAME]"
    )
    parser = add_verb("export", run, __doc__, usage=usage)
    parser.add_model()
    parser.add("out OUT", "a new or empty folder; with --to gguf a new .gguf file", type=Path)
    parser.add(
        "--to", "the format: hf, Hugging Face's GPT-2 (default), or gguf", "hf", choices=("hf", "gguf")
    )
    dtypes = "precision of the weights; int8 and int4 with --to gguf"
    parser.add("--dtype", dtypes, "float32", choices=(*machine.FLOATS, "int8", "int4"))
    machine.add_adapter(parser)
    machine.add_finding(parser)


def run(args: argparse.Namespace) -> int:
    if args.to == "gguf":
        return to_gguf(args)
    if args.dtype not in machine.FLOATS:
        raise UsageError(f"--to hf must have a float --dtype; got {args.dtype}. Export it --to gguf")
    with own_folder(args.out, None, "export", what="DIR"):
        return export(args)


def to_gguf(args: argparse.Namespace) -> int:
    from lama.checkpoints import export_gguf, load_causal

    out: Path = args.out
    if out.suffix != ".gguf":
        raise UsageError(f"OUT must be a .gguf file with --to gguf; got {quoted_path(out)}")
    if os.path.lexists(out):
        raise UsageError(f"OUT must be a new file; got {quoted_path(out)}, which exists. Choose another")
    model, tokenizer = load_causal(args.model, **machine.loading(args))
    export_gguf(out, model, tokenizer, Path(args.model).stem)
    print(f"saved in {out}: {out.stat().st_size / 1e6:,.1f} MB, {args.dtype}")
    return 0


def export(args: argparse.Namespace) -> int:
    from lama.checkpoints import export_huggingface, load_causal

    model, tokenizer = load_causal(args.model, **machine.loading(args))
    names = export_huggingface(args.out, model, tokenizer)
    print(f"saved in {args.out}: {', '.join(names)}")
    if not {"tokenizer.json", "vocab.json", "vocab.txt"} & {*names}:
        ids = "token ids are positions in the sorted alphabet of its config.json"
        print(f"its character tokenizer has no Hugging Face form: {ids}")
    return 0
