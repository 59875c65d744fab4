"""Compare lama with other engines on the CPU: decoding, prefill, batches, training, start-up, memory.

    python scripts/bench_cpu.py [--only decode,prefill,batch,train,start,memory] [--rounds 5] [--json FILE]

The peers come with `pip install -e ".[bench]"` (llama-cpp-python compiles for minutes and needs a C++
compiler). llama-batched-bench and ik_llama.cpp are programs, in the folders that --llama-tools and
--ik-llama-tools name. bench_serve.py says how llama.cpp is built; ik_llama.cpp's llama-bench is built in the
same way from ik-llama-cpp-python==0.1.5. A missing peer is left out, with a row that says so. The
models are GPT-2 124M with random weights and, by the name gguf, SmolLM2's file, found or fetched as by `lama
generate -m smollm2`, or that of --gguf.

Every engine is a separate process, stopped (SIGSTOP) while others are measured, since its spinning threads
would disturb. Each round measures all engines in turn, since shared machines change speed within seconds. A
ratio compares one round's pair; above 1, lama is faster. Limits are measured in every round: decoding reads
every weight once for each token, at most as fast as numpy reads memory; a prompt is limited by the
multiply-adds of all threads. PyTorch's training is the better of eager and compiled, as its name says. Prints
Markdown, with lama's aims next to the ratios. Measure on an otherwise idle machine.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_engines import FILE, NEEDS, TOOLS, missing
from bench_training import CONFIGS, share_of_peak
from workers import Answer, Worker, ratio, spread, table

from lama import __version__
from lama.cli.live import say
from lama.errors import LamaError
from lama.figures import check_installed, make_figure, render
from lama.host import cores
from lama.kernels.integers import multiplies_integers
from lama.runtime.device import use_device
from lama.tokenizers.bpe import gpt2_files

HERE = Path(__file__).parent
TASKS = ("decode", "prefill", "batch", "train", "start", "memory")
PROMPT, DECODED, LONG = 16, 128, 512  # tokens
ROWS, OF_EACH = [2, 4, 8, 16, 32], 64  # rows of a batch, and tokens of each
COLUMNS = ("work", "lama", "peer", "peer's", "ratio", "wanted", "of the limit")
Engine = tuple[str, str]  # name, weights
Answers = dict[Engine, Answer]
Targets = dict[str, float | None]  # by task: the ratio that is aimed at, if any


@dataclass(frozen=True)
class Comparison:
    """lama's weights, the peers with their tasks, and the aim in decoding: a share of the memory's speed."""

    ours: tuple[str, ...]
    peers: dict[Engine, Targets]
    share: float


COMPARISONS = {
    "float32": Comparison(
        ("float32",),
        {
            ("llama.cpp", "F32"): {"decode": 1.1, "prefill": 1.5},
            ("CTranslate2", "float32"): {"decode": 1.0, "prefill": 1.1},
            ("transformers", "float32"): {"decode": 1.7, "prefill": 2.5},
        },
        share=0.9,
    ),
    "half": Comparison(
        ("float16", "bfloat16"),
        {
            ("llama.cpp", "F16"): {"decode": 1.15, "prefill": None},
            ("transformers", "bfloat16"): {"decode": 1.8, "prefill": 1.3},
        },
        share=0.85,
    ),
    "int8": Comparison(
        ("int8",),
        {
            ("llama.cpp", "Q8_0"): {"decode": 1.3, "prefill": None},
            ("llama-batched-bench", "Q8_0"): {"batch": 1.3},
            ("CTranslate2", "int8"): {"decode": None, "prefill": 1.3, "batch": None},
        },
        share=0.8,
    ),
    "int4": Comparison(
        ("int4",),
        {
            ("llama.cpp", "Q4_0"): {"decode": 1.3, "prefill": None},
            ("llama-batched-bench", "Q4_0"): {"batch": 1.3},
        },
        share=0.8,
    ),
    FILE: Comparison(
        (FILE,),
        {
            ("llama.cpp", FILE): {"decode": 1.3, "prefill": 3.0},
            ("llama-batched-bench", FILE): {"batch": None},
            ("OpenVINO GenAI", FILE): {"decode": 1.0, "prefill": 1.0},
            ("ik_llama.cpp", FILE): {"decode": 1.0, "prefill": 1.0},
        },
        share=0.8,
    ),
}
# The ratio aimed at in each precision of training, by the configuration of bench_training.py.
STEPS = {
    "float32": {"cpu": 1.5, "gpu": 2.0, "124m": 1.5, "llama-30m": 1.5},
    "bfloat16": dict.fromkeys(CONFIGS, 1.3),
}
STARTS = {
    "float32": [("llama.cpp", "F32"), ("transformers", "float32")],
    FILE: [("llama.cpp", FILE)],
}
TINY = {"n_embd": 64, "n_layer": 2, "n_head": 2}
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # instructions, as the system names them
X86 = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
FEATURES = (*X86, "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(TASKS), metavar="TASKS", help=f"some of {','.join(TASKS)} (default: all)")
    add("--weights", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="for all but train")
    add("--gguf", default="smollm2", metavar="MODEL", help="the file of the weights gguf (default: smollm2)")
    add("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="for train")
    add("--precisions", nargs="+", choices=STEPS, default=list(STEPS), help="for train")
    add("--engines", nargs="+", help="peers to measure (default: all that are there)")
    add("--llama-tools", metavar="FOLDER", help="llama.cpp's programs, for llama-batched-bench")
    add("--ik-llama-tools", metavar="FOLDER", help="ik_llama.cpp's programs")
    add("--rows", type=int, nargs="+", default=ROWS, help="for batch (default: 2 4 8 16 32)")
    add("--plot", type=Path, metavar="FILE", help="draw tokens/s over the rows of a batch, as PNG")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=cores(), help="of every engine (default: all cores)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--tiny", action="store_true", help="tiny work, to try this script")
    args = parser.parse_args(argv)
    tasks = args.only.split(",")
    if wrong := set(tasks) - set(TASKS):
        parser.error(f"--only must name some of {', '.join(TASKS)}; got {', '.join(sorted(wrong))}")
    for name in ("rounds", "rows"):
        if (least := np.min(getattr(args, name))) < 1:
            parser.error(f"--{name} must be at least 1; got {least}")
    if args.plot:
        check_installed("--plot")
    os.environ.update(
        LAMA_THREADS=str(args.threads), OMP_NUM_THREADS=str(args.threads), TOKENIZERS_PARALLELISM="false"
    )
    folders = {"LLAMA_TOOLS": args.llama_tools, "IK_LLAMA_TOOLS": args.ik_llama_tools}
    os.environ.update({name: folder for name, folder in folders.items() if folder})
    about = {"lama": __version__, "threads": args.threads, "rounds": args.rounds, "processor": processor()}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(args, Path(folder))
        bench.run(tasks)
    print(f"{about['processor']}\n")
    print(f"{args.threads} threads, {args.rounds} rounds: medians, and in brackets the rounds' extremes\n")
    print(table(COLUMNS, bench.rows))
    if args.json:
        args.json.write_text(json.dumps(about | {"figures": bench.figures}))
    if args.plot:
        args.plot.write_bytes(plot_of_batches(bench.figures))


def plot_of_batches(figures: Mapping[str, Any]) -> bytes:
    """A PNG of each engine's tokens/s, medians of all rounds, over the rows of a batch."""
    lines: dict[str, dict[int, float]] = {}
    for name, figure in figures.items():
        if found := re.match(r"batch of (\d+) ", name):
            for engine, speeds in figure["tokens_s"].items():
                lines.setdefault(engine, {})[int(found[1])] = median(speeds)
    figure = make_figure("--plot", figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="rows of a batch", ylabel="tokens/s of all rows")
    for engine, points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker=".", label=engine)
    axes.set_ylim(bottom=0)
    axes.legend()
    return render(figure)


def processor() -> str:
    """The processor's name and the instructions that matter, by the system; lama's own probe of integers."""
    use_device("CPU")
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    flags = cpuinfo("flags", "Features").split()
    found = " ".join(flag for flag in FEATURES if flag in flags) or "no known instructions"
    probed = "multiplies integers" if multiplies_integers("CPU") else "has no instruction for integers"
    return f"{name}: {found}; lama's compiled code {probed}"


def cpuinfo(*fields: str) -> str:
    """A field of Linux's /proc/cpuinfo by any of its names; empty where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() in fields:
                return value.strip()
    return ""


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.rows: list[list[str]] = []
        self.figures: dict[str, Any] = {}
        self.read = make_reader(args.threads)
        self.file: Path | None = None

    def run(self, tasks: Sequence[str]) -> None:
        of_models = [task for task in tasks if task != "train"]
        if of_models and set(self.args.weights) - {FILE}:
            self.make_model()
        if of_models and FILE in self.args.weights:
            self.find_file()
        for weights in self.args.weights:
            if weights == FILE and self.file is None:
                continue
            if set(of_models) - {"start"}:
                self.compare(weights, [task for task in of_models if task != "start"])
            if "start" in tasks and weights in STARTS:
                self.starts(weights)
        if "start" in tasks:
            self.commands()
        if "train" in tasks:
            for precision in self.args.precisions:
                self.train(precision)

    def make_model(self) -> None:
        say("writing a model with random weights")
        sys.path.insert(0, str(HERE.parent / "tests"))
        from reference.random_gpt2 import make_config, make_weights, write_folder

        config = make_config(**(TINY if self.args.tiny else {}))
        write_folder(self.folder, config, make_weights(config))
        for name, content in gpt2_files().items():  # the peers' vocabulary
            (self.folder / name).write_bytes(content)

    def find_file(self) -> None:
        from lama.checkpoints import find

        try:
            self.file = Path(find(self.args.gguf).path)
        except LamaError as error:
            self.left_out("", str(error), self.args.gguf)

    def path(self, weights: str) -> Path:
        return self.file if weights == FILE and self.file else self.folder

    def shown(self, weights: str) -> str:
        return self.path(weights).stem if weights == FILE else weights

    def usable(self, peers: Sequence[Engine], work: str) -> Iterator[Engine]:
        """The chosen engines that are there; adds a row for each that is not."""
        for engine in peers:
            if self.args.engines and engine[0] not in self.args.engines:
                continue
            if reason := missing(engine[0]):
                self.left_out(engine_name(engine), reason, work)
            else:
                yield engine

    def left_out(self, peer: str, reason: str, work: str = "") -> None:
        say(f"{peer}: {reason}")
        self.rows.append([work, "", peer, f"left out: {reason}"])

    def compare(self, name: str, tasks: Sequence[str]) -> None:
        """Measure decoding, prefill, batches and memory with weights of one kind."""
        comparison = COMPARISONS[name]
        wanted = {engine: each for engine, each in comparison.peers.items() if set(each) & set(tasks)}
        if "memory" in tasks:
            wanted |= {engine: each for engine, each in comparison.peers.items() if "decode" in each}
        engines = [("lama", weights) for weights in comparison.ours]
        engines += self.usable(list(wanted), self.shown(name))
        workers: dict[Engine, Worker] = {}
        try:
            for engine in engines:
                command = [sys.executable, HERE / "bench_engines.py", *engine, self.path(name)]
                workers[engine] = Worker([*command, self.args.threads])
                if reason := workers[engine].ready():
                    self.drop(workers, engine, reason)
            self.measure(tasks, workers, comparison)
        finally:
            for worker in workers.values():
                worker.close()

    def drop(self, workers: dict[Engine, Worker], engine: Engine, reason: str) -> None:
        """Continue without an engine; adds a row with the reason."""
        workers.pop(engine).close()
        self.left_out(engine_name(engine), reason, self.shown(engine[1]) if engine[1] == FILE else "")

    def ask(self, workers: dict[Engine, Worker], asked: Sequence[Engine], **request: Any) -> Answers:
        """Send a request to some workers in turn; failing ones are dropped."""
        answers = {engine: workers[engine].ask(**request) for engine in asked if engine in workers}
        for engine, answer in answers.items():
            if "error" in answer:
                self.drop(workers, engine, answer["error"])
        return {engine: answer for engine, answer in answers.items() if "error" not in answer}

    def measure(self, tasks: Sequence[str], workers: dict[Engine, Worker], comparison: Comparison) -> None:
        lamas = [engine for engine in workers if engine[0] == "lama"]
        limits = self.ask(workers, lamas, do="limits", n=LONG)
        if not limits:
            return
        size = min(limit["vocab_size"] for limit in limits.values())
        rng = np.random.default_rng(0)

        def tokens(n: int = PROMPT) -> list[int]:  # each time others, as some engines remember prompts
            return rng.integers(0, size, n).tolist()

        if "memory" in tasks:  # before the long prompt
            inside = [engine for engine in workers if not set(NEEDS[engine[0]]) & set(TOOLS)]
            self.ask(workers, inside, do="decode", tokens=tokens(), n=DECODED)
            for engine, answer in self.ask(workers, inside, do="memory").items():
                self.memory(engine, answer["bytes"], limits.get(engine))
        if "decode" in tasks:
            self.rounds(workers, comparison, tokens, do="decode", n=DECODED)
        if "prefill" in tasks:
            self.rounds(workers, comparison, partial(tokens, LONG), do="prefill")
        if any("batch" in targets for targets in comparison.peers.values()):
            for rows in self.args.rows if "batch" in tasks else ():
                self.rounds(workers, comparison, tokens, do="batch", rows=rows, n=OF_EACH)

    def rounds(
        self,
        workers: dict[Engine, Worker],
        comparison: Comparison,
        tokens: Callable[[], list[int]],
        **request: Any,
    ) -> None:
        """Measure one piece of work in all rounds; adds a row for each pair of lama and a peer."""
        task = request["do"]
        work = f"batch of {request['rows']}" if task == "batch" else task
        lamas = [engine for engine in workers if engine[0] == "lama"]
        engines = [*lamas, *(engine for engine, targets in comparison.peers.items() if task in targets)]
        found: dict[Engine, list[Answer]] = {}
        limits: dict[Engine, list[Answer]] = {}
        bandwidths: list[float] = []
        for i in range(self.args.rounds + 1):  # the first warms up
            before = self.read()
            answers = self.ask(workers, engines, **request, tokens=tokens())
            bandwidth = max(before, self.read())
            bounds = self.ask(workers, lamas, do="limits", n=LONG)
            each = ", ".join(f"{engine_name(e)} {answer['tokens_s']:.1f}" for e, answer in answers.items())
            say(f"{work}, {f'round {i}' if i else 'warm-up'}: {each}; memory {bandwidth / 1e9:.1f} GB/s")
            if i:
                bandwidths.append(bandwidth)
                for engine, answer in answers.items():
                    found.setdefault(engine, []).append(answer)
                for engine, bound in bounds.items():
                    limits.setdefault(engine, []).append(bound)
        complete = {engine: each for engine, each in found.items() if len(each) == self.args.rounds}
        speeds = {engine: [answer["tokens_s"] for answer in each] for engine, each in complete.items()}
        for mine in [engine for engine in speeds if engine[0] == "lama"]:
            share, aim = "", ""
            if task == "decode":
                share = bandwidth_share(speeds[mine], bandwidths, limits[mine][0]["bytes_read"])
                aim = f"{comparison.share:.0%} of the limit"
            elif task == "prefill" and not self.args.tiny:
                share = peak_share(speeds[mine], limits[mine])
            title = f"{work} {self.shown(mine[1])}, tokens/s"
            for peer in [engine for engine in speeds if engine[0] != "lama"] or [("", "")]:
                target = comparison.peers.get(peer, {}).get(task)
                wanted = ", ".join(filter(None, [f"≥ {target}" if target else "", aim]))
                row = [title, spread(speeds[mine]), engine_name(peer), "", "", wanted, share]
                if theirs := speeds.get(peer):
                    pairs = zip(speeds[mine], theirs, strict=True)
                    row[3:5] = [spread(theirs), ratio([a / b for a, b in pairs])]
                self.rows.append(row)
        self.figures[f"{work} {'/'.join(map(self.shown, comparison.ours))}"] = {
            "tokens_s": {engine_name(engine): each for engine, each in speeds.items()},
            "read_bytes_s": bandwidths,
            "limits": {engine[1]: each for engine, each in limits.items()},
            "tokens": {engine_name(engine): each[-1].get("made", []) for engine, each in complete.items()},
        }

    def memory(self, engine: Engine, used: int, limits: Answer | None) -> None:
        name, work = engine_name(engine), f"memory {self.shown(engine[1])}"
        self.figures.setdefault(work, {})[name] = used
        say(f"{work}: {name} {used / 1e6:.0f} MB")
        if limits:
            most = f"≤ {(1.2 * limits['bytes_read'] + 300e6) / 1e6:.0f} MB"
            self.rows.append([work, f"{used / 1e6:.0f} MB", "", "", "", most])
        else:
            self.rows.append([work, "", name, f"{used / 1e6:.0f} MB"])

    def starts(self, weights: str) -> None:
        """Time processes that generate one token, with kernels cached; lama's also without a cache."""
        lama = ("lama", weights)
        engines = [lama, *self.usable(STARTS[weights], f"start {self.shown(weights)}")]
        seconds: dict[Engine, list[float]] = {engine: [] for engine in engines}
        for i in range(self.args.rounds + 1):
            for engine in engines:
                seconds[engine].append(self.start(engine))
            each = ", ".join(f"{engine[0]} {found[-1]:.2f} s" for engine, found in seconds.items())
            say(f"start, {f'round {i}' if i else 'warm-up'}: {each}")
        seconds = {engine: found[1:] for engine, found in seconds.items()}
        empty = self.start(lama, CACHEDB=str(self.folder / f"{weights}.db"))
        self.figures[f"start {self.shown(weights)}"] = {
            "seconds": {engine_name(engine): found for engine, found in seconds.items()},
            "empty_cache_s": empty,
        }
        work = f"start to first token {self.shown(weights)}, s"
        self.rows.append([work, spread(seconds[lama]), "", "", "", "≤ 0.8 s"])
        for peer in engines[1:]:
            ratios = [ours / theirs for ours, theirs in zip(seconds[lama], seconds[peer], strict=True)]
            row = [work, spread(seconds[lama]), engine_name(peer), spread(seconds[peer])]
            aim = "≤ 0.4 of its time" if peer[0] == "transformers" else ""
            self.rows.append([*row, f"{median(ratios):.2f} of its time", aim])
        self.rows.append(["the same, empty cache", f"{empty:.1f}", "", "", "", "< 10 s"])

    def start(self, engine: Engine, **environment: str) -> float:
        command = [sys.executable, HERE / "bench_engines.py", "start", *engine, self.path(engine[1])]
        return timed([*command, self.args.threads], **environment)

    def commands(self) -> None:
        """Time the commands that compute nothing."""
        for flag in ("--help", "--version"):
            seconds = [timed([sys.executable, "-m", "lama", flag]) for _ in range(self.args.rounds + 1)][1:]
            self.figures[f"lama {flag}, s"] = seconds
            self.rows.append([f"lama {flag}, s", spread(seconds), "", "", "", "≤ 0.15 s"])

    def train(self, precision: str) -> None:
        """Measure training steps of lama and PyTorch, eager and compiled, with bench_training.py."""
        work = f"training step {precision}"
        if precision == "bfloat16" and not BFLOAT16 & set(cpuinfo("flags", "Features").split()):
            self.left_out("", "the processor multiplies no bfloat16", work)
            return
        command = [sys.executable, HERE / "bench_training.py", "--steps-only", "--json"]
        command += ["--rounds", str(self.args.rounds), "--threads", str(self.args.threads)]
        command += ["--precision", precision, "--configs", *self.args.configs]
        if not list(self.usable([("PyTorch", precision)], work)):
            command += ["--libraries", "lama"]
        if self.args.tiny:
            command += ["--steps", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError("bench_training.py failed; see above")
        found = json.loads(done.stdout.splitlines()[-1])["configs"]
        self.figures[f"train {precision}"] = found
        for name, figures in found.items():
            ms, share = figures["ms_per_step"], share_of_peak(figures["ms_per_step"]["lama"], figures)
            row = [f"training step {name} {precision}, ms", spread(ms["lama"]), "", "", "", "", share]
            if peers := [library for library in ms if library != "lama"]:
                peer = min(peers, key=lambda library: median(ms[library]))
                wanted = f"≥ {STEPS[precision][name]}"
                wanted += ", or 85% of the limit" if precision == "float32" else ""
                row[2:6] = [peer, spread(ms[peer]), ratio(figures["ratios"][peer]), wanted]
            self.rows.append(row)
            for peer, reason in figures["left_out"].items():
                self.left_out(peer, reason, f"training step {name} {precision}")


def engine_name(engine: Engine) -> str:
    return " ".join(part for part in engine if part not in ("", FILE))


def bandwidth_share(speeds: Sequence[float], bandwidths: Sequence[float], bytes_read: float) -> str:
    """Median share of the memory bandwidth that reads the weights of tokens."""
    shares = [speed * bytes_read / bandwidth for speed, bandwidth in zip(speeds, bandwidths, strict=True)]
    return f"{median(shares):.0%} of {median(bandwidths) / 1e9:.1f} GB/s"


def peak_share(speeds: Sequence[float], limits: Sequence[Answer]) -> str:
    """Median share of the threads' peak for a token's products and causal attention."""
    peaks = [limit["peak_flops"] for limit in limits]
    if None in peaks:
        return ""
    shares = [speed * limits[0]["operations"] / peak for speed, peak in zip(speeds, peaks, strict=True)]
    unit = "GOP/s" if limits[0]["bits"] == 8 else "GFLOP/s"
    return f"{median(shares):.0%} of {median(peaks) / 1e9:.0f} {unit}"


def timed(command: Sequence[object], **environment: str) -> float:
    """Seconds of a process. Raises RuntimeError where it fails."""
    words = list(map(str, command))
    began = time.perf_counter()
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words[1:]} failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return time.perf_counter() - began


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
