"""Where and how a command computes: --device, --threads, --reference; and in which precision, with what at hand."""

import argparse
import os
from typing import Any

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "int8", "int4")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", metavar="NAME", help="a tinygrad device, such as CPU, CUDA or METAL (default: tinygrad's choice)")
    add("--threads", type=int, metavar="N", help="threads of the CPU's kernels (default: all cores; also LAMA_THREADS)")
    add("--reference", action="store_true", help="compute with tinygrad's own kernels, without lama's (also LAMA_REFERENCE=1)")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """`add_options`, and what a command asks that runs a model as it is: --dtype and those of `add_finding`."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="float32", help="precision of the weights; int8 and int4 of the matrices (default float32)")
    add_options(parser)
    add_finding(parser)


def add_finding(parser: argparse.ArgumentParser) -> None:
    """--offline and --tokenizer."""
    add = parser.add_argument
    add("--offline", action="store_true", help="use only what is on this machine")
    add("--tokenizer", metavar="NAME", help="gpt2, bytes, a folder with one, or nanoGPT's meta.pkl (default: the model's own)")


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `lama.load` that were given."""
    return {name: value for name, value in vars(args).items() if name in ("dtype", "offline", "revision", "tokenizer")}


def use(args: argparse.Namespace) -> None:
    """Follow these options; call it before anything is computed. Raises UsageError."""
    from lama.compiler import asked_threads

    asked = asked_threads(None if args.threads is None else str(args.threads))
    if asked is not None:
        os.environ["LAMA_THREADS"] = str(asked)
    if args.reference:
        os.environ["LAMA_REFERENCE"] = "1"
    if args.device:
        from lama.device import use_device

        use_device(args.device)
