"""Compare lama with other engines on the CPU: decoding, prefill, training, start-up, memory.

    python scripts/bench_cpu.py [--only decode,prefill,train,start,memory] [--rounds 5] [--json FILE]

The peers come with `pip install -e ".[bench]"` (llama-cpp-python compiles for minutes and needs a C++
compiler). A peer that is not installed is left out, with a row that says so. The model is GPT-2 124M with
random weights in a temporary folder. Every engine is a separate process, stopped (SIGSTOP) while others are
measured, since its spinning threads would disturb. Each round measures all engines in turn, since shared
machines change speed within seconds. A ratio compares one round's pair; above 1, lama is faster. Limits are
measured in every round: decoding reads every weight once a token, at most as fast as numpy reads memory; a
prompt is limited by the multiply-adds of all threads. Prints Markdown. Measure on an otherwise idle machine.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_engines import missing
from bench_training import share_of_peak

from lama import __version__
from lama.cli.live import say
from lama.host import cores
from lama.models.gpt import GPT2_CONFIGS
from lama.tokenizers.bpe import gpt2_files

HERE = Path(__file__).parent
TASKS = ("decode", "prefill", "train", "start", "memory")
PROMPT, DECODED, LONG = 16, 128, 512  # tokens
Engine = tuple[str, str]  # name, weights
# By precision: lama's weights, then the peers with the target ratios in decoding and in prefill.
PRECISIONS: dict[str, tuple[list[str], list[tuple[Engine, float | None, float | None]]]] = {
    "float32": (
        ["float32"],
        [
            (("llama.cpp", "F32"), 1.0, 1.5),
            (("CTranslate2", "float32"), 1.0, 1.1),
            (("transformers", "float32"), 1.7, 2.5),
        ],
    ),
    "half": (
        ["float16", "bfloat16"],
        [(("llama.cpp", "F16"), 1.0, None), (("transformers", "bfloat16"), 1.8, None)],
    ),
    "int8": (["int8"], [(("llama.cpp", "Q8_0"), 1.3, None), (("CTranslate2", "int8"), None, 1.0)]),
    "int4": (["int4"], [(("llama.cpp", "Q4_0"), 1.3, None)]),
}
STEPS = {"cpu": 1.5, "gpu": 2.0, "124m": 2.0}  # configurations of bench_training.py, with target ratios
STARTS = [("lama", "float32"), ("transformers", "float32"), ("llama.cpp", "F32")]
TINY = {"n_embd": 64, "n_layer": 2, "n_head": 2}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(TASKS), metavar="TASKS", help=f"some of {','.join(TASKS)} (default: all)"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="of decode, prefill and memory",
    )
    parser.add_argument("--configs", nargs="+", choices=STEPS, default=list(STEPS), help="of train")
    parser.add_argument("--engines", nargs="+", help="peers to measure (default: all that are installed)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores(), help="of every engine (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    args = parser.parse_args(argv)
    tasks = args.only.split(",")
    if wrong := set(tasks) - set(TASKS):
        parser.error(f"--only must name some of {', '.join(TASKS)}; got {', '.join(sorted(wrong))}")
    os.environ.update(
        LAMA_THREADS=str(args.threads), OMP_NUM_THREADS=str(args.threads), TOKENIZERS_PARALLELISM="false"
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(args, Path(folder))
        if {"decode", "prefill", "memory", "start"} & set(tasks):
            bench.make_model()
        if {"decode", "prefill", "memory"} & set(tasks):
            for precision in args.precisions:
                bench.compare(precision, [task for task in tasks if task in ("decode", "prefill", "memory")])
        if "start" in tasks:
            bench.starts()
        if "train" in tasks:
            bench.train()
    print(f"{args.threads} threads, {args.rounds} rounds: medians, and in brackets the rounds' extremes\n")
    print("| work | lama | peer | peer's | ratio | wanted | of the limit |\n|---|---|---|---|---|---|---|")
    for row in bench.rows:
        print("| " + " | ".join(row) + " |")
    if args.json:
        about = {"lama": __version__, "threads": args.threads, "rounds": args.rounds}
        args.json.write_text(json.dumps(about | {"figures": bench.figures}))


class Worker:
    """An engine in its own process, stopped between requests."""

    def __init__(self, engine: Engine, folder: Path, threads: int):
        command = [sys.executable, HERE / "bench_engines.py", *engine, folder, str(threads)]
        self.name = " ".join(engine)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.reason = self._read().get("error")
        """Error text of an engine that cannot be used, or None."""
        self._stop()

    def ask(self, **request: Any) -> dict[str, Any]:
        if hasattr(signal, "SIGCONT"):
            self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self._stop()
        return answer

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended with status {self.process.wait()}"}

    def _stop(self) -> None:
        if hasattr(signal, "SIGSTOP") and self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.rows: list[list[str]] = []
        self.figures: dict[str, Any] = {}
        self.read = make_reader(args.threads)

    def make_model(self) -> None:
        say("writing a model with random weights")
        sys.path.insert(0, str(HERE.parent / "tests"))
        from reference.random_gpt2 import make_config, make_weights, write_folder

        config = make_config(**(TINY if self.args.tiny else {}))
        write_folder(self.folder, config, make_weights(config))
        for name, content in gpt2_files().items():  # the peers' vocabulary
            (self.folder / name).write_bytes(content)

    def usable(self, peers: Sequence[Engine], work: str) -> Iterator[Engine]:
        """The chosen and installed engines; adds a row for each engine that is not installed."""
        for engine in peers:
            if self.args.engines and engine[0] not in self.args.engines:
                continue
            if lacking := missing(engine[0]):
                reason = f"not installed: {', '.join(lacking)}"
                self.rows.append([work, "", " ".join(engine), reason, "", "", ""])
            else:
                yield engine

    def compare(self, precision: str, tasks: Sequence[str]) -> None:
        """Measure decoding, prefill and memory with weights of one precision."""
        ours, theirs = PRECISIONS[precision]
        wanted = {engine: {"decode": decode, "prefill": prefill} for engine, decode, prefill in theirs}
        engines = [("lama", weights) for weights in ours]
        engines += self.usable([engine for engine, *_ in theirs], precision)
        workers: dict[Engine, Worker] = {}
        try:
            for engine in engines:
                worker = Worker(engine, self.folder, self.args.threads)
                workers[engine] = worker
                if worker.reason:
                    self.drop(workers, engine, worker.reason)
            self.measure(precision, tasks, workers, wanted)
        finally:
            for worker in workers.values():
                worker.close()

    def drop(self, workers: dict[Engine, Worker], engine: Engine, reason: str) -> None:
        """Continue without an engine; adds a row with the reason."""
        workers.pop(engine).close()
        say(f"{' '.join(engine)}: {reason}")
        self.left_out(" ".join(engine), reason)

    def left_out(self, peer: str, reason: str, work: str = "") -> None:
        self.rows.append([work, "", peer, f"left out: {reason.replace('|', '/')}", "", "", ""])

    def ask(self, workers: dict[Engine, Worker], **request: Any) -> dict[Engine, dict[str, Any]]:
        """Send a request to all workers in turn; failing ones are dropped."""
        answers = {engine: worker.ask(**request) for engine, worker in workers.items()}
        for engine, answer in answers.items():
            if "error" in answer:
                self.drop(workers, engine, answer["error"])
        return {engine: answer for engine, answer in answers.items() if "error" not in answer}

    def measure(
        self, precision: str, tasks: Sequence[str], workers: dict[Engine, Worker], wanted: dict[Engine, Any]
    ) -> None:
        rng = np.random.default_rng(0)
        long = rng.integers(0, GPT2_CONFIGS["gpt2"].vocab_size, LONG).tolist()
        requests: dict[str, dict[str, Any]] = {
            "decode": {"do": "decode", "tokens": long[:PROMPT], "n": DECODED},
            "prefill": {"do": "prefill", "tokens": long},
        }
        self.ask(workers, **requests["decode"])  # drops engines that cannot run
        if "memory" in tasks:  # before the long prompt
            used = self.ask(workers, do="memory")
        lamas = {engine: worker for engine, worker in workers.items() if engine[0] == "lama"}
        limits = self.ask(lamas, do="limits")
        if "memory" in tasks:
            for engine, answer in used.items():
                self.memory(engine, answer["bytes"], limits.get(engine))
        for task in [task for task in tasks if task != "memory"]:
            speeds: dict[Engine, list[float]] = {engine: [] for engine in workers}
            bandwidths: list[float] = []
            peaks: dict[Engine, list[float | None]] = {engine: [] for engine in lamas}
            made: dict[Engine, list[int]] = {}
            for i in range(self.args.rounds + 1):  # the first warms up
                before = self.read()
                for engine, answer in self.ask(workers, **requests[task]).items():
                    speeds[engine].append(answer["tokens_s"])
                    made[engine] = answer.get("made", [])
                bandwidths.append(max(before, self.read()))
                for engine, answer in self.ask(lamas, do="limits").items() if task == "prefill" else ():
                    peaks[engine].append(answer["peak_flops"])
                each = ", ".join(f"{' '.join(engine)} {speeds[engine][-1]:.1f}" for engine in workers)
                step = f"round {i}" if i else "warm-up"
                say(f"{task} {precision}, {step}: {each}; memory {bandwidths[-1] / 1e9:.1f} GB/s")
            speeds = {engine: speeds[engine][1:] for engine in workers}
            self.figures[f"{task} {precision}"] = {
                "tokens_s": {" ".join(engine): found for engine, found in speeds.items()},
                "read_bytes_s": bandwidths[1:],
                "peak_flops": {weights: found[1:] for (_, weights), found in peaks.items()},
                "limits": {weights: limit for (_, weights), limit in limits.items()},
                "tokens": {" ".join(engine): tokens for engine, tokens in made.items()},
            }
            for mine in lamas:
                if task == "decode":
                    share = self.bandwidth_share(speeds[mine], bandwidths[1:], limits[mine]["bytes_read"])
                else:
                    share = self.peak_share(mine[1], speeds[mine], peaks[mine][1:])
                work = f"{task} {mine[1]}, tokens/s"
                for peer in [engine for engine in workers if engine[0] != "lama"] or [("", "")]:
                    target = wanted.get(peer, {}).get(task)
                    self.pair(work, speeds[mine], peer, speeds.get(peer), target, share)

    def bandwidth_share(self, speeds: Sequence[float], bandwidths: Sequence[float], bytes_read: float) -> str:
        """Median share of the memory bandwidth that reads the weights of tokens."""
        shares = [speed * bytes_read / bandwidth for speed, bandwidth in zip(speeds, bandwidths, strict=True)]
        return f"{median(shares):.0%} of {median(bandwidths) / 1e9:.1f} GB/s"

    def peak_share(self, weights: str, speeds: Sequence[float], peaks: Sequence[float | None]) -> str:
        """Median share of the threads' peak for a token's products and causal attention."""
        if None in peaks or self.args.tiny:
            return ""
        c = GPT2_CONFIGS["gpt2"]
        operations = 2 * 12 * c.n_layers * c.d_model**2 + 2 * c.n_layers * c.d_model * LONG
        shares = [speed * operations / peak for speed, peak in zip(speeds, peaks, strict=True)]
        unit = "GOP/s" if weights.startswith("int") else "GFLOP/s"
        return f"{median(shares):.0%} of {median(peaks) / 1e9:.0f} {unit}"

    def pair(
        self,
        work: str,
        mine: Sequence[float],
        peer: Engine,
        theirs: Sequence[float] | None,
        wanted: float | None,
        share: str,
    ) -> None:
        row = [work, spread(mine), " ".join(peer).strip(), "", "", f"≥ {wanted}" if wanted else "", share]
        if theirs:
            row[3:5] = [spread(theirs), ratio([a / b for a, b in zip(mine, theirs, strict=True)])]
        self.rows.append(row)

    def memory(self, engine: Engine, used: int, limits: dict[str, float] | None) -> None:
        name = " ".join(engine)
        self.figures.setdefault("memory, bytes", {})[name] = used
        say(f"memory: {name} {used / 1e6:.0f} MB")
        if limits:
            most = f"≤ {(1.2 * limits['bytes_read'] + 300e6) / 1e6:.0f} MB"
            self.rows.append([f"memory {engine[1]}", f"{used / 1e6:.0f} MB", "", "", "", most, ""])
        else:
            self.rows.append(["memory", "", name, f"{used / 1e6:.0f} MB", "", "", ""])

    def starts(self) -> None:
        """Time processes that generate one token, with kernels cached; lama's also without a cache."""
        engines = [STARTS[0], *self.usable(STARTS[1:], "start")]
        seconds: dict[Engine, list[float]] = {engine: [] for engine in engines}
        for i in range(self.args.rounds + 1):
            for engine in engines:
                seconds[engine].append(self.start(engine))
            each = ", ".join(f"{engine[0]} {found[-1]:.2f} s" for engine, found in seconds.items())
            say(f"start, {f'round {i}' if i else 'warm-up'}: {each}")
        seconds = {engine: found[1:] for engine, found in seconds.items()}
        empty = self.start(STARTS[0], CACHEDB=str(self.folder / "cache.db"))
        self.figures["start"] = {
            "seconds": {" ".join(engine): found for engine, found in seconds.items()},
            "empty_cache_s": empty,
        }
        for peer in engines[1:] or [None]:
            row = ["start to first token, s", spread(seconds[STARTS[0]])]
            if peer:
                pairs = zip(seconds[STARTS[0]], seconds[peer], strict=True)
                ratios = [ours / theirs for ours, theirs in pairs]
                row += [" ".join(peer), spread(seconds[peer]), f"{median(ratios):.2f} of its time"]
                row += ["≤ 0.4" if peer[0] == "transformers" else ""]
            self.rows.append([*row, *[""] * (7 - len(row))])
        self.rows.append(["the same, empty cache", f"{empty:.1f}", "", "", "", "< 10", ""])

    def start(self, engine: Engine, **environment: str) -> float:
        script, threads = HERE / "bench_engines.py", str(self.args.threads)
        command = [sys.executable, script, "start", *engine, self.folder, threads]
        began = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{engine[0]} did not start: {(done.stderr.strip().splitlines() or [''])[-1]}")
        return time.perf_counter() - began

    def train(self) -> None:
        """Measure training steps of lama and PyTorch, eager and compiled, with bench_training.py.

        The target is the ratio to the faster of the two.
        """
        command = [sys.executable, HERE / "bench_training.py", "--steps-only", "--json"]
        command += ["--rounds", str(self.args.rounds), "--threads", str(self.args.threads)]
        command += ["--configs", *self.args.configs]
        if not list(self.usable([("PyTorch", "float32")], "training step")):
            command += ["--libraries", "lama"]
        if self.args.tiny:
            command += ["--steps", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError("bench_training.py failed; see above")
        found = json.loads(done.stdout.splitlines()[-1])["configs"]
        self.figures["train"] = found
        for name, figures in found.items():
            ms = figures["ms_per_step"]
            for peer in [library for library in ms if library != "lama"] or [None]:
                share = share_of_peak(ms["lama"], figures)
                row = [f"training step {name}, ms", spread(ms["lama"]), "", "", "", "", share]
                if peer:
                    row[2:6] = [peer, spread(ms[peer]), ratio(figures["ratios"][peer]), f"≥ {STEPS[name]}"]
                self.rows.append(row)
            for peer, reason in figures["left_out"].items():
                self.left_out(peer, reason, f"training step {name}")


def spread(values: Sequence[float]) -> str:
    def short(value: float) -> str:
        return f"{value:.0f}" if value >= 200 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

    return f"{short(median(values))} ({short(min(values))}–{short(max(values))})"


def ratio(rounds: Sequence[float]) -> str:
    return f"**{median(rounds):.2f}** ({min(rounds):.2f}–{max(rounds):.2f})"


def make_reader(threads: int, size: int = 1 << 28) -> Callable[[], float]:
    """A function that measures bytes per second read by numpy on some threads, the best of three."""
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    pool = ThreadPoolExecutor(threads)

    def read() -> float:
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            list(pool.map(np.max, parts))  # a product would hold the interpreter lock: one core only
            best = min(best, time.perf_counter() - began)
        return size / best

    return read


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
