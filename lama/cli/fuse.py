"""Fold an adapter (LoRA) into its model.

Save the model with an adapter's changes in its weights, as one model that needs no adapter. Weights of 8 or 4
bits are widened first, to --dtype. `lama export` and `lama quantize` write the result in other forms.
"""

import argparse
from pathlib import Path

from lama.cli import AddVerb, machine
from lama.cli.out import own_folder


def add_parser(add_verb: AddVerb) -> None:
    usage = "%(prog)s -m MODEL ADAPTER --out DIR [--dtype DTYPE] [--offline] [--tokenizer NAME]"
    parser = add_verb("fuse", run, __doc__, usage=usage)
    parser.add_model()
    parser.add("adapter ADAPTER", "the adapter's folder, with adapter_config.json", type=Path)
    parser.add("--out DIR", "a new or empty folder", type=Path, required=True)
    parser.add("--dtype", "precision of the weights", "float32", choices=machine.FLOATS)
    machine.add_finding(parser)


def run(args: argparse.Namespace) -> int:
    from lama.checkpoints import find, is_adapter, load_causal, open_checkpoint, save
    from lama.errors import UsageError
    from lama.files import quoted_path

    if is_adapter(Path(args.model)):
        raise UsageError(f"MODEL must be a model; got the adapter {quoted_path(args.model)}")
    with own_folder(args.out, None, "fuse"):
        model, tokenizer = load_causal(args.model, **machine.loading(args))
        tensors = open_checkpoint(find(args.model, offline=args.offline).path).tensors().values()
        kinds = sorted({tensor.stored or tensor.dtype for tensor in tensors} - {*machine.FLOATS})
        save(args.out, model, tokenizer, {"fused": {"model": args.model, "adapter": str(args.adapter)}})
    if kinds:
        print(f"weights of {', '.join(kinds)} are now {args.dtype}; lama quantize makes them small again")
    print(f"saved in {args.out}: {args.model} with {args.adapter} in its weights, {args.dtype}")
    return 0
