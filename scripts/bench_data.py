"""Speed and memory of `lama data`, and the tokenizer's own speed, on rows made of the King James Bible.

    python scripts/bench_data.py --mb 2000

It runs in turn, `--runs` times: encoding alone, in one process for each core, and `lama data` with as many
processes. If other work disturbs the clock, compare the seconds of processor time. Memory is the resident
memory of all processes together, read from /proc every tenth of a second.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from lama.data import batch, open_tokens
from lama.data.packages import bible_verses
from lama.host import cores
from lama.tokenizers import gpt2_tokenizer

VERSES = 12  # of a row: about 1.6 kB
SAMPLE = 16  # MB that are encoded to measure the tokenizer


def rows(rng: random.Random, mb: float):
    verses = [verse.text for verse in bible_verses()]
    size = 0
    while size < mb * 1e6:
        text = "\n".join(rng.choices(verses, k=VERSES))
        size += len(text)
        yield text


def encode(texts: list[str]) -> tuple[int, float]:
    tokenizer, began = gpt2_tokenizer(), time.process_time()
    return sum(len(tokenizer.encode_inside(text)) for text in texts), time.process_time() - began


def own_speed(workers: int) -> tuple[float, float]:
    """MB of text that the tokenizer encodes per second of real time, and per second of processor time."""
    texts = list(rows(random.Random(1), SAMPLE))
    parts = [texts[i : i + 50] for i in range(0, len(texts), 50)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(encode, parts[: 2 * workers])  # each loads the tokenizer
        began = time.perf_counter()
        used = sum(seconds for _, seconds in pool.map(encode, parts, chunksize=4))
        mb = sum(map(len, texts)) / 1e6
        return mb / (time.perf_counter() - began), mb / used


def memory_of(pid: int) -> int:
    """Bytes of resident memory of a process and its children."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if pid in (int(fields["Pid"]), int(fields["PPid"])):
            total += int(fields.get("VmRSS", "0").split()[0]) * 1024
    return total


def run_data(file: Path, out: Path, workers: int) -> tuple[float, float, float]:
    """Seconds of real time and of processor time of `lama data`, and its peak memory in MB."""
    command = [sys.executable, "-m", "lama", "data", str(file), "--out", str(out), "--workers", str(workers)]
    most, began, before = 0, time.perf_counter(), os.times()
    with subprocess.Popen(command) as process:
        ended = threading.Event()

        def watch() -> None:
            nonlocal most
            while not ended.wait(0.1):
                most = max(most, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
    assert code == 0
    after = os.times()
    used = sum(after[2:4]) - sum(before[2:4])
    return time.perf_counter() - began, used, most / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=100, help="MB of text (default 100)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each (default 1)")
    args = parser.parse_args()
    for name in ("mb", "runs"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0; got {getattr(args, name)}")
    workers = cores()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        size = 0
        with open(file, "w") as out:
            for text in rows(random.Random(0), args.mb):
                out.write(json.dumps({"text": text}) + "\n")
                size += len(text)
        mb = size / 1e6
        best = [0.0] * 4
        for _ in range(args.runs):
            own = own_speed(workers)
            seconds, used, memory = run_data(file, Path(folder, "tokens"), workers)
            best = list(map(max, best, (*own, mb / seconds, mb / used)))
            print(f"lama data: {mb:,.0f} MB in {seconds:.1f} s, with {memory:,.0f} MB of memory", flush=True)
        for what, alone, ours in (("by the clock", *best[::2]), ("in a second of a processor", *best[1::2])):
            print(f"MB/s {what}, the best: {ours:.1f}; tokenizer alone {alone:.1f}; share {ours / alone:.2f}")
        tokens = open_tokens(Path(folder, "tokens"))
        began = time.perf_counter()
        n = sum(int(batch(tokens.train, step, 0, 12, 1024)[0].size) for step in range(1000))
        print(f"batches: {n / (time.perf_counter() - began) / 1e6:.0f} million tokens/s", end="; ")
        begins = np.searchsorted(tokens.ends["train"], [0, len(tokens.train) - 1])
        print(f"{int(begins[1]) + 1:,} documents")


if __name__ == "__main__":
    main()
