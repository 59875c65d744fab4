"""Evaluate a model: perplexity, HellaSwag, LAMBADA, tasks of lm-evaluation-harness.

Evaluate a model by one of three: its perplexity on a text, in sliding windows as in Hugging Face's
documentation; a benchmark, scored as in EleutherAI's lm-evaluation-harness; or tasks of that library itself.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import AddVerb, machine
from lama.cli.live import progress
from lama.errors import UsageError, check_least, note
from lama.evaluation import BENCHMARKS

if TYPE_CHECKING:
    from lama.evaluation.tasks import TaskScore
    from lama.models.gpt import GPT
    from lama.tokenizers import Tokenizer


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("eval", run, __doc__)
    parser.add_model()
    add = parser.add
    add("--text FILE", "compute the perplexity of this text: a corpus as for lama train")
    add("--stride N", "tokens by which the window moves (default: half a window)", type=int)
    add("--task", "a benchmark, read from --data", choices=BENCHMARKS)
    add("--data FILE", "its official JSON-lines file: hellaswag_val.jsonl, lambada_test.jsonl", type=Path)
    add("--harness TASKS", "tasks of lm-evaluation-harness, separated by commas; needs lm_eval")
    add("--include DIR", "a folder with more tasks for --harness, as YAML", type=Path)
    add("--shots N", "examples before each item of --harness (default: the task's own)", type=int)
    add("--limit N", "only the first N examples", type=int)
    add("--context-length T", "tokens that the model sees at once (default: the model's own)", type=int)
    machine.add_loading(parser)
    add("--json", "print one JSON object")
    add("-v, --verbose", "print the model's size and device")


def run(args: argparse.Namespace) -> int:
    check(args)
    machine.use(args)
    report = (run_task if args.task else run_tasks if args.harness is not None else run_text)(args)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    return 0


def check(args: argparse.Namespace) -> None:
    if [args.text, args.task, args.harness].count(None) != 2:
        raise UsageError("give one of --text FILE, --task TASK with --data FILE, and --harness TASKS")
    if (args.task is None) != (args.data is None):
        raise UsageError("--task and --data must be given together: the benchmark, and its JSON-lines file")
    if args.harness is not None and not args.harness.strip(", "):
        raise UsageError(f"--harness must name tasks, separated by commas; got {args.harness!r}")
    for option, value, owners in (
        ("--stride", args.stride, ("text",)),
        ("--limit", args.limit, ("task", "harness")),
        ("--include", args.include, ("harness",)),
        ("--shots", args.shots, ("harness",)),
    ):
        if value is not None and all(getattr(args, owner) is None for owner in owners):
            belongs = " or ".join(f"--{owner}" for owner in owners)
            raise UsageError(f"{option} must be given with {belongs}; got {option} {value} without it")


def load_model(args: argparse.Namespace) -> "tuple[GPT, Tokenizer]":
    from lama.checkpoints import load_causal

    model, tokenizer = load_causal(args.model, **machine.loading(args))
    if args.verbose:
        note(machine.about(args.model, model))
    return model, tokenizer


def run_text(args: argparse.Namespace) -> dict[str, object]:
    from lama.data import open_corpus
    from lama.evaluation.sliding import perplexity

    text = open_corpus([args.text]).text
    model, tokenizer = load_model(args)
    began = time.perf_counter()
    watch = partial(progress, unit="window")
    result = perplexity(model, tokenizer, text, args.stride, args.context_length, watch)
    seconds = time.perf_counter() - began
    report = {
        "model": args.model,
        "text": args.text,
        "context_length": result.context_length,
        "stride": result.stride,
        "tokens": result.tokens,
        "bytes": result.n_bytes,
        "nats_per_token": result.nats_per_token,
        "perplexity": finite(result.perplexity),
        "bits_per_token": result.bits_per_token,
        "bits_per_byte": result.bits_per_byte,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(result.tokens / seconds, 2),
    }
    if not args.json:
        windows = f"windows of {result.context_length} moving by {result.stride}"
        rows = {
            "tokens scored": f"{result.tokens:,} ({result.n_bytes:,} bytes), {windows}",
            "nats per token": f"{result.nats_per_token:.4f}",
            "perplexity": f"{result.perplexity:,.4f}",
            "bits per token": f"{result.bits_per_token:.4f}",
            "bits per byte": f"{result.bits_per_byte:.4f}",
            "rate": f"{result.tokens / seconds:,.0f} tokens/s, {seconds:.1f} s with compilation",
        }
        print("\n".join(f"{name:<15} {value}" for name, value in rows.items()))
    return report


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def run_task(args: argparse.Namespace) -> dict[str, object]:
    from lama.evaluation.published import PUBLISHED, SIZES
    from lama.evaluation.tasks import TASKS, evaluate, read_examples

    task = TASKS[args.task]
    examples = read_examples(task, args.data, args.limit)
    model, tokenizer = load_model(args)
    began = time.perf_counter()
    watch = partial(progress, unit="ending")
    result = evaluate(task, model, tokenizer, examples, args.context_length, watch)
    seconds = time.perf_counter() - began
    if not args.json:
        print(task_lines(args.task, task.protocol, result, seconds))
        print(published_lines(args.task))
    published = []
    for series in PUBLISHED[args.task]:
        about = {"protocol": series.protocol, "same_protocol": series.same, "source": series.source}
        figures = {metric: dict(zip(SIZES, row, strict=True)) for metric, row in series.figures.items()}
        published.append(about | figures)
    return {
        "model": args.model,
        "task": args.task,
        "data": str(args.data),
        "protocol": task.protocol,
        "examples": result.examples,
        "cut": result.cut,
        **{metric: finite(value) for metric, value in result.metrics.items()},
        "acc_stderr": result.standard_error("acc"),
        "seconds": round(seconds, 3),
        "published": published,
    }


def run_tasks(args: argparse.Namespace) -> dict[str, object]:
    from lama.evaluation.harness import lm_eval, run_harness
    from lama.generation import generate

    check_least("--limit", args.limit, 1)
    check_least("--shots", args.shots, 0)
    lm_eval()
    model, tokenizer = load_model(args)
    context = args.context_length or model.config.context_length

    def answer(tokens: Sequence[int], options: Mapping[str, Any]) -> str:
        stop = options.get("until") or []
        return str(
            generate(
                model,
                tokenizer,
                tokens,
                max_new_tokens=int(options["max_gen_toks"]),
                temperature=float(options["temperature"]),
                stop=[stop] if isinstance(stop, str) else [text for text in stop if text],
                context=context,
            )
        )

    began, tasks = time.perf_counter(), [name for name in args.harness.split(",") if name]
    watch = partial(progress, unit="row")
    chosen = {"include": args.include, "limit": args.limit, "shots": args.shots}
    shared = {"context_length": args.context_length, "progress": watch}
    with redirect_stdout(sys.stderr):  # the harness prints
        found = run_harness(model, tokenizer, tasks, answer, **chosen, **shared)
    seconds = time.perf_counter() - began
    if not args.json:
        for task, metrics in found.items():
            for name, value in metrics.items():
                if not name.endswith("_stderr"):
                    error = metrics.get(f"{name}_stderr", math.nan)
                    print(
                        f"{task:<24} {name:<16} {value:.4f}" + (f" ± {error:.4f}" if error == error else "")
                    )
        print(f"{seconds:.1f} s with compilation")
    results = {
        task: {name: finite(value) for name, value in metrics.items()} for task, metrics in found.items()
    }
    return {"model": args.model, "results": results, "seconds": round(seconds, 3)}


def task_lines(name: str, protocol: str, result: "TaskScore", seconds: float) -> str:
    cut = f", {result.cut:,} of them cut on the left to fit the context" if result.cut else ""
    head = f"{name}: {result.examples:,} examples{cut}, {seconds:.1f} s with compilation"
    lines = [head, f"protocol: {protocol}"]
    for metric, value in result.metrics.items():
        shown = f"{value:,.2f}"
        if metric.startswith("acc"):
            error = result.standard_error(metric)
            shown = f"{100 * value:.2f} %" + ("" if error is None else f" ± {100 * error:.2f}")
        lines.append(f"{metric:<15} {shown}")
    return "\n".join(lines)


def published_lines(name: str) -> str:
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
