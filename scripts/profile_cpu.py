"""Where the time of a training step, a prompt or a token goes on the CPU: each kernel's, and its share of what the threads could do.

    python scripts/profile_cpu.py cpu|gpu|124m|prefill|decode [--repeats 5] [--threads N] [--top 20]

cpu, gpu and 124m are steps of bench_training.py's models on random tokens; prefill is GPT-2 124M with random float32 weights that
reads 512 tokens, decode its next tokens. A row has all kernels of one name: of each the best of the repeats, added up. The peak of
all threads at once is measured before each repeat. Prints Markdown. Figures made beside other work on the machine mean nothing.
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

from lama.device import use_device
from lama.generation import Decoder
from lama.kernels import plan
from lama.kernels.peak import peak_flops
from lama.kernels.pool import Replay, pool, threads
from lama.models.gpt import GPT, GPT2_CONFIGS

PROMPT = 512  # tokens


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=[*CONFIGS, "prefill", "decode"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="(default: all cores)")
    parser.add_argument("--top", type=int, default=20, help="rows (default 20)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {args.repeats}")
    if args.threads:
        os.environ["LAMA_THREADS"] = str(args.threads)
    use_device("CPU")
    work, peaks = work_of(args.work), []
    for _ in range(3):  # the first captures
        work()
    with kernels_timed() as kernels:
        for _ in range(args.repeats):
            peaks.append(peak_flops("CPU") or float("nan"))
            work()
    print(table([(name, operations, min(seconds)) for name, operations, seconds in kernels.values()], median(peaks), args.top))
    print(f"\n{args.work}, {threads()} threads, {args.repeats} repeats; peak {median(peaks) / 1e9:.0f} GFLOP/s")


def work_of(name: str) -> Callable[[], object]:
    """What does it once."""
    if name in CONFIGS:
        trainer = trainer_of("lama", config_of(CONFIGS[name]), VOCABULARIES.get(name, CHARACTERS))
        return lambda: next(trainer)
    plan.is_fast = lambda *_: False  # a step stays what tinygrad captured, with the kernels' names and operations
    shape = GPT2_CONFIGS["gpt2"]
    decoder, tokens = Decoder(GPT(shape, seed=0)), np.random.default_rng(0).integers(0, shape.vocab_size, (1, PROMPT))
    if name == "prefill":
        return lambda: decoder.prefill(tokens)
    decoder.prefill(tokens[:, :16])
    return lambda: decoder.decode(tokens[0, :1])


@contextmanager
def kernels_timed() -> Iterator[dict[tuple[int, int], tuple[str, float, list[float]]]]:
    """Within it, captured steps run one kernel at a time. Yields, by its place, each one's name, operations, and seconds of each run."""
    found: dict[tuple[int, int], tuple[str, float, list[float]]] = {}
    again = Replay.again

    def timed(replay: Any) -> None:
        at = ctypes.addressof(replay._words)
        for i, (start, call) in enumerate(zip(replay._starts, replay.calls, strict=True)):
            kernel = call[1].src[0].arg
            began = time.perf_counter()
            pool().run(at + 8 * start, 1)
            took = time.perf_counter() - began
            name = kernel.name.removeprefix("lama_")
            found.setdefault((id(replay), i), (name, float(kernel.estimates.ops if kernel.estimates else 0), []))[2].append(took)

    Replay.again = timed
    try:
        yield found
    finally:
        Replay.again = again


def table(kernels: Sequence[tuple[str, float, float]], peak: float, top: int) -> str:
    """Of (name, operations, seconds): the names that take most, then the others, then all."""
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
