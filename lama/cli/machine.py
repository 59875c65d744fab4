"""Options of device, threads and reference kernels, and of loading models."""

import argparse
import os
from typing import Any

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "int8", "int4")
LOADING = ("dtype", "offline", "revision", "tokenizer")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--device",
        metavar="NAME",
        help="a tinygrad device, such as CL or CUDA (default: an NVIDIA, AMD or Apple GPU, else CPU)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="threads of the CPU kernels (default: all cores; also LAMA_THREADS)",
    )
    add(
        "--reference",
        action="store_true",
        help="compute with tinygrad's own kernels, without lama's (also LAMA_REFERENCE=1)",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_options` and `add_finding`, and --dtype."""
    add = parser.add_argument
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="precision of the weights; int8 and int4 apply to matrices (default float32)",
    )
    add_options(parser)
    add_finding(parser)


def add_finding(parser: argparse.ArgumentParser) -> None:
    """Add --offline and --tokenizer."""
    add = parser.add_argument
    add("--offline", action="store_true", help="use only files on this machine")
    add(
        "--tokenizer",
        metavar="NAME",
        help="gpt2, bytes, a tokenizer's folder, or nanoGPT's meta.pkl (default: the model's own)",
    )


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The given options of `lama.load`."""
    return {name: value for name, value in vars(args).items() if name in LOADING}


def place(args: argparse.Namespace, device: object) -> str:
    """The place of a loaded model: `float32 on CPU (named by DEV)`."""
    from lama.runtime.device import device_reason

    return f"{args.dtype} on {device} ({device_reason()})"


def use(args: argparse.Namespace) -> None:
    """Apply the options; call this before anything is computed. Raises UsageError."""
    from lama.runtime.compiler import asked_threads

    asked = asked_threads(None if args.threads is None else str(args.threads))
    if asked is not None:
        os.environ["LAMA_THREADS"] = str(asked)
    if args.reference:
        os.environ["LAMA_REFERENCE"] = "1"
    if args.device:
        from lama.runtime.device import use_device

        use_device(args.device)
