"""Profile a training step, a prompt or a token on the CPU: each kernel's time and share of the peak.

    python scripts/profile_cpu.py WORK [-m MODEL] [--dtype int8] [--rows 8] [--precision bfloat16]

WORK cpu, gpu, 124m and llama-30m are steps of bench_training.py's models on random tokens. prefill is a
prompt of 512 tokens, decode the next token of each of --rows texts. The model is GPT-2 124M with random
weights, or one that `lama generate -m` takes. A table's row sums all kernels of one name, each with the best
of its repeats. The peak of all threads is measured before each repeat. Prints Markdown. Measure on an
otherwise idle machine.
"""

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
from bench_training import CHARACTERS, CONFIGS, VOCABULARIES, config_of, trainer_of
from tinygrad.helpers import ansistrip

from lama.checkpoints import load_causal
from lama.generation import Runner
from lama.kernels.peak import peak_flops
from lama.models.gpt import GPT, GPT2_CONFIGS
from lama.runtime import replay
from lama.runtime.device import use_device
from lama.runtime.threads import CallGraph, pool, threads

PROMPT = 512  # tokens


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=[*CONFIGS, "prefill", "decode"])
    parser.add_argument("-m", "--model", help="for prefill, decode (default: GPT-2 124M, random weights)")
    parser.add_argument("--dtype", help="precision of MODEL's weights (default: its own)")
    parser.add_argument("--rows", type=int, default=1, help="texts that decode continues (default 1)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of a step's products"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="(default: all cores)")
    parser.add_argument("--top", type=int, default=20, help="rows of the table (default 20)")
    args = parser.parse_args(argv)
    for name in ("repeats", "rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    if args.dtype and not args.model:
        parser.error(f"--dtype must come with -m MODEL; got {args.dtype} for random float32 weights")
    if args.threads:
        os.environ["LAMA_THREADS"] = str(args.threads)
    use_device("CPU")
    if args.work in CONFIGS:
        work = training_step(args.work, args.precision)
    else:
        work = prompt_or_token(args.work, args.model, args.dtype, args.rows)
    bits, peaks = 16 if args.precision == "bfloat16" else 32, []
    for _ in range(3):  # the first captures
        work()
    with kernels_timed() as kernels:
        for _ in range(args.repeats):
            peaks.append(peak_flops("CPU", bits) or float("nan"))
            work()
    best = [(name, operations, min(seconds)) for name, operations, seconds in kernels.values()]
    print(table(best, median(peaks), args.top))
    peak = f"peak {median(peaks) / 1e9:.0f} GFLOP/s"
    print(f"\n{args.work}, {threads()} threads, {args.repeats} repeats; {peak}")


def training_step(name: str, precision: str) -> Callable[[], object]:
    """A function that does a step of one of bench_training.py's models."""
    config = config_of({**CONFIGS[name], "precision": precision})
    trainer = trainer_of("lama", config, VOCABULARIES.get(name, CHARACTERS))
    return lambda: next(trainer)


def prompt_or_token(name: str, model: str | None, dtype: str | None, rows: int) -> Callable[[], object]:
    """A function that reads a prompt, or decodes a token of each row."""
    # Without replay, a step has tinygrad's captured kernels with names and operations.
    replay.is_fast = lambda *_: False
    loaded = load_causal(model, dtype=dtype)[0] if model else GPT(GPT2_CONFIGS["gpt2"], seed=0)
    runner = Runner(loaded, rows)
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (rows, PROMPT))
    if name == "prefill":
        return lambda: runner.prefill(tokens)
    runner.prefill(tokens[:, :16])
    return lambda: runner.decode(tokens[:, 0])


@contextmanager
def kernels_timed() -> Iterator[dict[tuple[int, int], tuple[str, float, list[float]]]]:
    """Run captured steps one kernel at a time; yields (name, operations, seconds of each run) by kernel."""
    found: dict[tuple[int, int], tuple[str, float, list[float]]] = {}
    rerun = CallGraph.rerun

    def timed(graph: Any, first: int = 0, last: int | None = None) -> None:
        at = ctypes.addressof(graph._words)
        calls = list(enumerate(zip(graph._starts, graph.calls, strict=True)))
        for i, (start, call) in calls[first:last]:
            kernel = call[1].src[0].arg
            began = time.perf_counter()
            pool().run(at + 8 * start, 1)
            took = time.perf_counter() - began
            name = ansistrip(kernel.name).removeprefix("lama_")
            operations = float(kernel.estimates.ops) if kernel.estimates else 0.0
            found.setdefault((id(graph), i), (name, operations, []))[2].append(took)

    CallGraph.rerun = timed
    try:
        yield found
    finally:
        CallGraph.rerun = rerun


def table(kernels: Sequence[tuple[str, float, float]], peak: float, top: int) -> str:
    """A table of (name, operations, seconds): the slowest names, then the others, then all."""
    total = sum(seconds for _, _, seconds in kernels)
    rows: dict[str, list[float]] = {}
    for name, operations, seconds in kernels:
        row = rows.setdefault(name, [0, 0, 0])
        row[:] = row[0] + 1, row[1] + operations, row[2] + seconds
    ordered = sorted(rows.items(), key=lambda item: -item[1][2])
    rest = np.sum([row for _, row in ordered[top:]] or [[0, 0, 0]], axis=0).tolist()
    all_of_them = np.sum(list(rows.values()), axis=0).tolist()
    lines = ["| kernel | times | ms | of the time | of the peak |", "|---|---|---|---|---|"]
    for name, (times, operations, seconds) in [*ordered[:top], ("others", rest), ("all", all_of_them)]:
        share = f"{operations / seconds / peak:.0%}" if operations and seconds else ""
        lines.append(f"| {name} | {times:.0f} | {1e3 * seconds:.2f} | {seconds / total:.1%} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
