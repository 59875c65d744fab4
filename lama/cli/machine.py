"""Where and how a command computes: --device, --threads, --reference; and in which precision, with what at hand."""

import argparse
import os

from lama.errors import UsageError

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "int8", "int4")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", metavar="NAME", help="a tinygrad device, such as CPU, CUDA or METAL (default: tinygrad's choice)")
    add("--threads", type=int, metavar="N", help="threads of the CPU's kernels (default: all cores; also LAMA_THREADS)")
    add("--reference", action="store_true", help="compute with tinygrad's own kernels, without lama's (also LAMA_REFERENCE=1)")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """`add_options`, and what a command asks that runs a model as it is: --dtype and --offline."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="float32", help="precision of the weights; int8 and int4 of the matrices (default float32)")
    add_options(parser)
    add("--offline", action="store_true", help="use only what is on this machine")


def use(args: argparse.Namespace) -> None:
    """Before anything is computed. Raises UsageError."""
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"threads must be a whole number above 0; got {args.threads}")
        os.environ["LAMA_THREADS"] = str(args.threads)
    if args.reference:
        os.environ["LAMA_REFERENCE"] = "1"
    if args.device:
        from lama.device import use_device

        use_device(args.device)
