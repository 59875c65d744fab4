"""`lama eval`: perplexity on a text, HellaSwag, LAMBADA."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.live import progress
from lama.errors import UsageError, note

if TYPE_CHECKING:
    from lama.evaluation import TaskScore, TextScore

TASKS = ("hellaswag", "lambada")  # lama.evaluation's; spelled out, so that --help stays light


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "eval",
        help="judge a model: perplexity, HellaSwag, LAMBADA",
        description="Judge a model by its perplexity on a text, in sliding windows as Hugging Face's documentation has it, or by a "
        "benchmark, as EleutherAI's lm-evaluation-harness has it.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, a folder or a file, as for lama generate")
    add("--text", metavar="FILE", help="the text to take the perplexity of: a file, or what else lama train takes for a corpus")
    add("--stride", type=int, metavar="N", help="tokens that a window moves by (default: half of it)")
    add("--task", choices=TASKS, help="a benchmark, read from --data")
    add("--data", type=Path, metavar="FILE", help="its official JSON-lines file: hellaswag_val.jsonl, lambada_test.jsonl")
    add("--limit", type=int, metavar="N", help="only the first N examples")
    add("--context-length", type=int, metavar="T", help="tokens that the model sees at once (default: all it can)")
    machine.add_loading(parser)
    add("--json", action="store_true", help="print one JSON object")
    add("-v", "--verbose", action="store_true", help="say what is loaded")


def run(args: argparse.Namespace) -> int:
    check(args)
    machine.use(args)
    report = run_text(args) if args.task is None else run_task(args)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if (args.text is None) == (args.task is None):
        raise UsageError("what to judge by must be one thing: give --text FILE, or --task TASK with --data FILE")
    if (args.task is None) != (args.data is None):
        raise UsageError("--task and --data must be given together: the benchmark, and its JSON-lines file")
    for option, value, belongs in (("--stride", args.stride, "--text"), ("--limit", args.limit, "--task")):
        if value is not None and (args.text is None) == (belongs == "--text"):
            raise UsageError(f"{option} must be given with {belongs}; got {option} {value} without it")


def load_model(args: argparse.Namespace) -> Any:
    from lama.checkpoints import load_gpt

    model, tokenizer = load_gpt(args.model, **machine.loading(args))
    if args.verbose:
        note(f"{args.model}: {model.describe()}; {args.dtype} on {model.embed.weight.device}")
    return model, tokenizer


def run_text(args: argparse.Namespace) -> dict[str, Any]:
    from lama.data import open_corpus
    from lama.evaluation import perplexity

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
    rows = (
        ("tokens scored", f"{result.tokens:,} ({result.n_bytes:,} bytes), windows of {result.context_length} moving by {result.stride}"),
        ("nats per token", f"{result.nats_per_token:.4f}"),
        ("perplexity", f"{result.perplexity:,.4f}"),
        ("bits per token", f"{result.bits_per_token:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("rate", f"{result.tokens / seconds:,.0f} tokens/s, {seconds:.1f} s with compilation"),
    )
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def run_task(args: argparse.Namespace) -> dict[str, Any]:
    from lama.evaluation import TASKS, evaluate, read_examples
    from lama.evaluation.published import PUBLISHED, SIZES

    task = TASKS[args.task]
    examples = read_examples(task, args.data, args.limit)
    model, tokenizer = load_model(args)
    began = time.perf_counter()
    result = evaluate(task, model, tokenizer, examples, args.context_length, watch("ending"))
    seconds = time.perf_counter() - began
    if not args.json:
        print(task_lines(args.task, task.protocol, result, seconds))
        print(published_lines(args.task))
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
        "published": [
            {"protocol": s.protocol, "same_protocol": s.same, "source": s.source}
            | {metric: dict(zip(SIZES, values, strict=True)) for metric, values in s.figures.items()}
            for s in PUBLISHED[args.task]
        ],
    }


def task_lines(name: str, protocol: str, result: "TaskScore", seconds: float) -> str:
    cut = f", {result.cut:,} of them cut on the left to fit the context" if result.cut else ""
    lines = [f"{name}: {result.examples:,} examples{cut}, {seconds:.1f} s with compilation", f"protocol: {protocol}"]
    for metric, value in result.metrics.items():
        if metric.startswith("acc"):
            error = result.standard_error(metric)
            lines.append(f"{metric:<15} {100 * value:.2f} %" + ("" if error is None else f" ± {100 * error:.2f}"))
        else:
            lines.append(f"{metric:<15} {value:,.2f}")
    return "\n".join(lines)


def published_lines(name: str) -> str:
    """The figures of others, each with its protocol and source."""
    from lama.evaluation.published import PUBLISHED, SIZES

    lines = ["", f"{'published, GPT-2':<20}" + "".join(f"{size:>9}" for size in SIZES)]
    for i, series in enumerate(PUBLISHED[name], 1):
        for metric, values in series.figures.items():
            unit = metric + (", %" if metric.startswith("acc") else "")
            cells = "".join(f"{'-' if value is None else f'{value:.2f}':>9}" for value in values)
            lines.append(f"{f'[{i}] {unit}':<20}{cells}")
    for i, series in enumerate(PUBLISHED[name], 1):
        lines.append(f"[{i}] {'this' if series.same else 'another'} protocol, {series.protocol}; from {series.source}")
    return "\n".join(lines)


def watch(unit: str) -> Any:
    """Shows how far the scores are."""
    return lambda scores, total: progress(scores, unit, "", total)
