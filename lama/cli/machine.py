"""Options of device, threads and reference kernels, and of loading models."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from lama.cli import Parser

if TYPE_CHECKING:
    from lama.models.gpt import GPT

FLOATS = ("float32", "float16", "bfloat16")
LOADING = ("dtype", "float_activations", "offline", "revision", "tokenizer", "adapter")


def add_options(parser: Parser) -> None:
    devices = "a tinygrad device, such as CL or CUDA (default: an NVIDIA, AMD or Apple GPU, else CPU)"
    parser.add("--device NAME", devices)
    threads = "threads of the CPU kernels (default: all cores; also LAMA_THREADS)"
    parser.add("--threads N", threads, type=int)
    parser.add("--reference", "compute with tinygrad's own kernels, without lama's (also LAMA_REFERENCE=1)")


def add_loading(parser: Parser, several: bool = False) -> None:
    """Add --dtype, --adapter and the options of `add_options` and `add_finding`.

    With `several`, --adapter may be given several times.
    """
    dtypes = "precision of the weights; int8 and int4 apply to matrices"
    dtypes += " (default: a quantised file's, else float32)"
    parser.add("--dtype", dtypes, choices=(*FLOATS, "int8", "int4"))
    floats = (
        "multiply quantised weights by activations as they are, not rounded to 8 bits: slower, more exact"
    )
    parser.add("--float-activations", floats)
    add_adapter(parser, **({"action": "append"} if several else {}))
    add_options(parser)
    add_finding(parser)


def add_adapter(parser: Parser, **more: Any) -> None:
    adapter = "the folder of an adapter (LoRA) of the model, as lama train --lora and PEFT write them"
    parser.add("--adapter DIR", adapter, **more)


def add_finding(parser: Parser) -> None:
    parser.add("--offline", "use only files on this machine")
    tokenizers = "gpt2, bytes, a tokenizer's folder, or nanoGPT's meta.pkl (default: the model's own)"
    parser.add("--tokenizer NAME", tokenizers)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in LOADING}


def about(name: str, model: "GPT") -> str:
    """The name and size of a loaded model, and its place: `float32 on CPU (named by DEV)`."""
    from lama.checkpoints.fill import DTYPE_NAMES
    from lama.models.quantized import dtype_of
    from lama.models.registry import describe
    from lama.runtime.device import device_reason

    weight = model.embed.weight
    dtype = dtype_of(model) or DTYPE_NAMES[weight.dtype]
    return f"{name}: {describe(model)}; {dtype} on {weight.device} ({device_reason()})"


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
