"""Save a model in 8 or 4 bits.

Save a model with its matrices in 8 or 4 bits and a scale for each 32 weights. Report its size, its error and
its perplexity. It is loaded like any other model.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine
from lama.cli.out import own_folder

if TYPE_CHECKING:
    from lama.models.gpt import GPT

TOKENS = 128  # length of the random sequence whose logits are compared
HELD_OUT = 30  # the last thirtieth of the Bible; lama-bpe was not trained on the last tenth


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("quantize", run, __doc__)
    parser.add_model()
    parser.add("--to", "the matrices' dtype", choices=("int8", "int4"), required=True)
    parser.add("--out DIR", "a new or empty folder", type=Path, required=True)
    text = "also compute the perplexity of this text, as lama eval does"
    parser.add("--text FILE", f"{text} (default for lama-bpe: held-out text)")
    machine.add_options(parser)
    machine.add_finding(parser)


def run(args: argparse.Namespace) -> int:
    machine.use(args)
    with own_folder(args.out, None, "quantize"):
        return quantize(args)


def quantize(args: argparse.Namespace) -> int:
    from tinygrad.nn.state import get_parameters

    from lama.checkpoints import find, load_causal, open_checkpoint, save
    from lama.evaluation.sliding import perplexity
    from lama.models.quantized import refuse_quantized

    text = read_text(args)
    path = find(args.model, offline=args.offline).path
    model, tokenizer = load_causal(path, dtype="float32", **machine.loading(args))
    refuse_quantized(model, "to be quantised")
    quantized, _ = load_causal(path, dtype=args.to, **machine.loading(args))
    before, after = (sum(weight.nbytes() for weight in get_parameters(m)) / 1e6 for m in (model, quantized))
    error = logits_error(model, quantized, min(tokenizer.vocab_size, model.config.vocab_size))
    report = {
        "size": f"{before:.1f} MB in float32, {after:.1f} MB in {args.to}",
        "logits": f"{error:.2%} relative rms error, {TOKENS} random tokens",
    }
    if text:
        was, now = (perplexity(m, tokenizer, text) for m in (model, quantized))
        rise = now.perplexity / was.perplexity - 1
        change = f"{was.perplexity:.4f} in float32, {now.perplexity:.4f} here ({rise:+.2%})"
        report["perplexity"] = f"{change}, {was.tokens:,} tokens"
    notes = open_checkpoint(path).notes
    save(args.out, quantized, tokenizer, {**notes, "quantized": report})
    for name, value in report.items():
        print(f"{name:<11} {value}")
    print(f"saved in {args.out}")
    return 0


def read_text(args: argparse.Namespace) -> str:
    """The text of --text; by default held-out text of the Bible for lama-bpe, and none for other models."""
    from lama.checkpoints import EMBEDDED
    from lama.data import default_corpus, open_corpus

    if args.text is not None:
        return open_corpus([args.text]).text
    if Path(args.model).name != EMBEDDED:
        return ""
    text = default_corpus().text
    return text[-len(text) // HELD_OUT :]


def logits_error(model: "GPT", other: "GPT", vocab_size: int) -> float:
    """√(Σ(other - model)² / Σ model²) over the logits of a fixed random sequence."""
    import numpy as np
    from tinygrad import Tensor

    size = 1, min(TOKENS, model.config.context_length)
    tokens = Tensor(np.random.default_rng(0).integers(vocab_size, size=size).astype(np.int32))
    expected, got = (m(tokens).numpy().astype(float) for m in (model, other))
    return math.sqrt(((got - expected) ** 2).sum() / (expected**2).sum())
