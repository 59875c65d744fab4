"""`lama eval`: perplexity on a text, HellaSwag, LAMBADA."""

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import Verbs, machine
from lama.cli.live import progress
from lama.errors import UsageError, note
from lama.evaluation import BENCHMARKS

if TYPE_CHECKING:
    from lama.evaluation.likelihood import Progress, Scores
    from lama.evaluation.sliding import TextScore
    from lama.evaluation.tasks import TaskScore
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "eval",
        help="evaluate a model: perplexity, HellaSwag, LAMBADA",
        description="Evaluate a model by its perplexity on a text, in sliding windows as in Hugging Face's "
        "documentation, or by a benchmark, as in EleutherAI's lm-evaluation-harness.",
    )
    parser.set_defaults(run=run)
    parser.add_model()
    add = parser.add_argument
    add("--text", metavar="FILE", help="compute the perplexity of this text: a corpus as for lama train")
    add("--stride", type=int, metavar="N", help="tokens that a window moves by (default: half a window)")
    add("--task", choices=BENCHMARKS, help="a benchmark, read from --data")
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="its official JSON-lines file: hellaswag_val.jsonl, lambada_test.jsonl",
    )
    add("--limit", type=int, metavar="N", help="only the first N examples")
    add(
        "--context-length",
        type=int,
        metavar="T",
        help="tokens that the model sees at once (default: the model's own)",
    )
    machine.add_loading(parser)
    add("--json", action="store_true", help="print one JSON object")
    add("-v", "--verbose", action="store_true", help="print the model's size and device")


def run(args: argparse.Namespace) -> int:
    check(args)
    machine.use(args)
    report = run_text(args) if args.task is None else run_task(args)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that exclude or require each other."""
    if (args.text is None) == (args.task is None):
        raise UsageError("give either --text FILE, or --task TASK with --data FILE")
    if (args.task is None) != (args.data is None):
        raise UsageError("--task and --data must be given together: the benchmark, and its JSON-lines file")
    for option, value, belongs in (("--stride", args.stride, "--text"), ("--limit", args.limit, "--task")):
        if value is not None and (args.text is None) == (belongs == "--text"):
            raise UsageError(f"{option} must be given with {belongs}; got {option} {value} without it")


def load_model(args: argparse.Namespace) -> "tuple[GPT, Tokenizer]":
    from lama.checkpoints import load_causal
    from lama.models.registry import describe

    model, tokenizer = load_causal(args.model, **machine.loading(args))
    if args.verbose:
        note(f"{args.model}: {describe(model)}; {machine.place(args, model.embed.weight.device)}")
    return model, tokenizer


def run_text(args: argparse.Namespace) -> dict[str, object]:
    from lama.data import open_corpus
    from lama.evaluation.sliding import perplexity

    text = open_corpus([args.text]).text
    model, tokenizer = load_model(args)
    began = time.perf_counter()
    result = perplexity(model, tokenizer, text, args.stride, args.context_length, watch("window"))
    seconds = time.perf_counter() - began
    report = {
        "model": args.model,
        "text": args.text,
        "context_length": result.context_length,
        "stride": result.stride,
        "tokens": result.tokens,
        "bytes": result.n_bytes,
        "nats_per_token": result.nats_per_token,
        "perplexity": None if math.isinf(result.perplexity) else result.perplexity,
        "bits_per_token": result.bits_per_token,
        "bits_per_byte": result.bits_per_byte,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(result.tokens / seconds, 2),
    }
    if not args.json:
        print(text_lines(result, seconds))
    return report


def text_lines(result: "TextScore", seconds: float) -> str:
    windows = f"windows of {result.context_length} moving by {result.stride}"
    rows = (
        ("tokens scored", f"{result.tokens:,} ({result.n_bytes:,} bytes), {windows}"),
        ("nats per token", f"{result.nats_per_token:.4f}"),
        ("perplexity", f"{result.perplexity:,.4f}"),
        ("bits per token", f"{result.bits_per_token:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("rate", f"{result.tokens / seconds:,.0f} tokens/s, {seconds:.1f} s with compilation"),
    )
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def run_task(args: argparse.Namespace) -> dict[str, object]:
    from lama.evaluation.published import PUBLISHED, SIZES
    from lama.evaluation.tasks import TASKS, evaluate, read_examples

    task = TASKS[args.task]
    examples = read_examples(task, args.data, args.limit)
    model, tokenizer = load_model(args)
    began = time.perf_counter()
    result = evaluate(task, model, tokenizer, examples, args.context_length, watch("ending"))
    seconds = time.perf_counter() - began
    if not args.json:
        print(task_lines(args.task, task.protocol, result, seconds))
        print(published_lines(args.task))
    published = []
    for series in PUBLISHED[args.task]:
        figures = {metric: dict(zip(SIZES, row, strict=True)) for metric, row in series.figures.items()}
        about = {"protocol": series.protocol, "same_protocol": series.same, "source": series.source}
        published.append(about | figures)
    return {
        "model": args.model,
        "task": args.task,
        "data": str(args.data),
        "protocol": task.protocol,
        "examples": result.examples,
        "cut": result.cut,
        **result.metrics,
        "acc_stderr": result.standard_error("acc"),
        "seconds": round(seconds, 3),
        "published": published,
    }


def task_lines(name: str, protocol: str, result: "TaskScore", seconds: float) -> str:
    cut = f", {result.cut:,} of them cut on the left to fit the context" if result.cut else ""
    lines = [
        f"{name}: {result.examples:,} examples{cut}, {seconds:.1f} s with compilation",
        f"protocol: {protocol}",
    ]
    for metric, value in result.metrics.items():
        if metric.startswith("acc"):
            error = result.standard_error(metric)
            margin = "" if error is None else f" ± {100 * error:.2f}"
            lines.append(f"{metric:<15} {100 * value:.2f} %{margin}")
        else:
            lines.append(f"{metric:<15} {value:,.2f}")
    return "\n".join(lines)


def published_lines(name: str) -> str:
    """Published figures, each with its protocol and source."""
    from lama.evaluation.published import PUBLISHED, SIZES

    lines = ["", f"{'published, GPT-2':<20}" + "".join(f"{size:>9}" for size in SIZES)]
    for i, series in enumerate(PUBLISHED[name], 1):
        for metric, values in series.figures.items():
            unit = metric + (", %" if metric.startswith("acc") else "")
            cells = "".join(f"{'-' if value is None else f'{value:.2f}':>9}" for value in values)
            lines.append(f"{f'[{i}] {unit}':<20}{cells}")
    for i, series in enumerate(PUBLISHED[name], 1):
        which = "this" if series.same else "another"
        lines.append(f"[{i}] {which} protocol, {series.protocol}; from {series.source}")
    return "\n".join(lines)


def watch(unit: str) -> "Progress":
    """A wrapper that shows the progress of scores."""

    def shown(scores: "Iterable[Scores]", total: int) -> "Iterable[Scores]":
        return progress(scores, unit, "", total)

    return shown
