"""`lama quantize`: a model with matrices of 8 or 4 bits, and what that costs."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.out import own_folder

if TYPE_CHECKING:
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer

TOKENS = 128  # of the fixed sequence whose logits are compared
HELD_OUT = 30  # this part of the Bible; lama-bpe was not trained on its last tenth


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "quantize",
        help="store a model in 8 or 4 bits",
        description="Store a model with its matrices in 8 or 4 bits, a scale for each 32 weights, and say what that costs. "
        "It is loaded like any other.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, a folder or a file, as for lama generate")
    add("--to", choices=("int8", "int4"), required=True, help="the matrices' dtype")
    add("--out", type=Path, metavar="DIR", required=True, help="a new or empty folder")
    add(
        "--text",
        metavar="FILE",
        help="take the perplexity of this text, too, as lama eval does (default for lama-bpe: what it was not trained on)",
    )
    machine.add_options(parser)
    machine.add_finding(parser)


def run(args: argparse.Namespace) -> int:
    machine.use(args)
    with own_folder(args.out, None, "quantize"):
        return quantize(args)


def quantize(args: argparse.Namespace) -> int:
    from tinygrad.nn.state import get_parameters

    from lama.checkpoints import describe, find, load_gpt, save
    from lama.models.quantized import refuse_quantized

    text = read_text(args)
    path = find(args.model, offline=args.offline).path
    model, tokenizer = load_gpt(path, **machine.loading(args))
    refuse_quantized(model, "to be quantised")
    quantized, _ = load_gpt(path, dtype=args.to, **machine.loading(args))
    before, after = (sum(weight.nbytes() for weight in get_parameters(m)) / 1e6 for m in (model, quantized))
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    report = {
        "size": f"{before:.1f} MB in float32, {after:.1f} MB in {args.to}",
        "logits": f"{logits_error(model, quantized, vocab_size):.2%} relative rms error, {TOKENS} random tokens",
    }
    if text:
        report["perplexity"] = perplexities(model, quantized, tokenizer, text)
    notes = describe(path).fields.get("training")
    save(args.out, quantized, tokenizer, {**(notes if isinstance(notes, dict) else {}), "quantized": report})
    for name, value in report.items():
        print(f"{name:<11} {value}")
    print(f"saved in {args.out}")
    return 0


def read_text(args: argparse.Namespace) -> str:
    """The text asked for; for lama-bpe, by default, the end of the Bible, on which it was not trained; else none."""
    from lama.checkpoints import EMBEDDED
    from lama.data import default_corpus, open_corpus

    if args.text is not None:
        return open_corpus([args.text]).text
    if Path(args.model).name != EMBEDDED:
        return ""
    text = default_corpus().text
    return text[-len(text) // HELD_OUT :]


def logits_error(model: "GPT", other: "GPT", vocab_size: int) -> float:
    """√(Σ(other - model)² / Σ model²) over the logits of a fixed sequence of random tokens."""
    import numpy as np
    from tinygrad import Tensor

    rng = np.random.default_rng(0)
    tokens = Tensor(rng.integers(vocab_size, size=(1, min(TOKENS, model.config.context_length))).astype(np.int32))
    expected, got = (m(tokens).numpy().astype(float) for m in (model, other))
    return math.sqrt(((got - expected) ** 2).sum() / (expected**2).sum())


def perplexities(model: "GPT", other: "GPT", tokenizer: "Tokenizer", text: str) -> str:
    from lama.evaluation import perplexity

    before, after = (perplexity(m, tokenizer, text) for m in (model, other))
    rise = after.perplexity / before.perplexity - 1
    return f"{before.perplexity:.4f} in float32, {after.perplexity:.4f} here ({rise:+.2%}), {before.tokens:,} tokens"
