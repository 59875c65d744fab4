"""Compare training with lama and with plain PyTorch on the CPU: whole runs, and the time of a step.

    python scripts/bench_training.py --run shakespeare-char-cpu [--corpus FILE] [--seeds 0 1 2]
    python scripts/bench_training.py --steps-only [--configs cpu gpu 124m llama-30m] [--rounds 5]

--run trains the model of a preset from start to end, each run in a separate process. It reports the loss on
the whole held-out text, the time of the steps, and the time of the process from its imports to the saved
model. PyTorch gets lama's windows and learning rates, and random weights of the same distribution. lama's
process also counts n-grams and writes its log and a checkpoint.

--steps-only times steps on random tokens, some steps of each library in every round, so that all find the
machine in the same state. Prints a Markdown table of medians, with each round's ratio; above 1, lama is
faster. PyTorch is measured eager and with torch.compile, whose Inductor needs a C++ compiler. If that fails,
it is left out, with a line that gives the reason.

PyTorch's code is torch_gpt.py; without PyTorch (pip install lama[peers]) only lama runs. All use all cores,
or --threads. Measure on an otherwise idle machine.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lama import __version__
from lama.cli.live import say
from lama.kernels.peak import peak_flops
from lama.models.gpt import GPT
from lama.runtime.device import use_device
from lama.runtime.threads import threads
from lama.training.budget import training_operations
from lama.training.loop import Step, Trainer, language_model_batches
from lama.training.prepare import make_tokenizer, model_config
from lama.training.run import EVALUATION_BATCH
from lama.training.settings import RunConfig, read_settings, run_config

# nanoGPT's flags for a CPU, its config/train_shakespeare_char.py, GPT-2 124M in windows of 256 tokens, and a
# model of 30M parameters in Llama's shape.
CONFIGS: dict[str, dict[str, Any]] = {
    "cpu": {"n_layers": 4, "n_heads": 4, "d_model": 128, "batch_size": 12, "context_length": 64},
    "gpu": {
        "n_layers": 6,
        "n_heads": 6,
        "d_model": 384,
        "batch_size": 64,
        "context_length": 256,
        "dropout": 0.2,
    },
    "124m": {
        "n_layers": 12,
        "n_heads": 12,
        "d_model": 768,
        "batch_size": 4,
        "context_length": 256,
        "learning_rate": 6e-4,
    },
    "llama-30m": {
        "n_layers": 9,
        "n_heads": 8,
        "n_kv_heads": 4,
        "d_model": 512,
        "d_mlp": 1376,
        "activation": "silu",
        "gated": True,
        "norm_kind": "rms",
        "positions": "rope",
        "batch_size": 4,
        "context_length": 256,
        "learning_rate": 6e-4,
    },
}
VOCABULARIES = {"124m": 50257, "llama-30m": 8192}
CHARACTERS = 65  # of tinyshakespeare, the vocabulary of the others
STEPS = {"cpu": 50, "gpu": 2, "124m": 2, "llama-30m": 2}  # a round
LIBRARIES = ("lama", "torch", "torch.compile")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run", metavar="PRESET", help="whole runs of a preset of lama train, or of a .toml file"
    )
    what.add_argument("--steps-only", action="store_true", help="the time of a step")
    parser.add_argument(
        "--corpus", metavar="FILE", help="text of --run, a file or a name (default: the preset's)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="seeds of --run, for each library (default 0 1 2)",
    )
    parser.add_argument(
        "--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="for --steps-only (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="with --steps-only (default 5)")
    parser.add_argument("--steps", type=int, help="steps of a run, or of a round")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of products (PyTorch: autocast)",
    )
    parser.add_argument("--threads", type=int, help="threads of both (default: all cores)")
    parser.add_argument(
        "--libraries", nargs="+", choices=LIBRARIES, help="(default: all; --run omits torch.compile)"
    )
    parser.add_argument("--json", action="store_true", help="also print all figures as one line of JSON")
    parser.add_argument("--child", choices=LIBRARIES, help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args(argv)
    if args.threads:
        os.environ["LAMA_THREADS"] = str(args.threads)
    use_device("CPU")
    if args.child:
        print(json.dumps(run_lama(args) if args.child == "lama" else run_torch(args)))
        return

    libraries = args.libraries or list(LIBRARIES[:2] if args.run else LIBRARIES)
    if libraries != ["lama"] and importlib.util.find_spec("torch") is None:
        libraries = [library for library in libraries if library == "lama"]
        say("PyTorch is not installed; left out")
    figures = compare_runs(args, libraries) if args.run else compare_steps(args, libraries)
    if args.json:
        about = {"threads": threads(), "precision": args.precision, "versions": versions(libraries)}
        print("\n" + json.dumps(about | figures))


def versions(libraries: Sequence[str]) -> dict[str, str]:
    found = {"lama": __version__, "tinygrad": importlib.metadata.version("tinygrad")}
    return found | ({"torch": importlib.metadata.version("torch")} if "torch" in libraries else {})


# --- whole runs


def compare_runs(args: argparse.Namespace, libraries: Sequence[str]) -> dict[str, Any]:
    """Run all libraries for each seed in turn; prints the table, returns all figures."""
    results: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    for seed in args.seeds:
        for library in libraries:
            result = one_run(args, library, seed)
            results[library].append(result)
            took = f"{result['steps_s']:.1f} s of {result['all_s']:.1f} s"
            say(f"seed {seed}, {library}: held-out loss {result['loss']:.4f}, {took}")

    config = settings_of(args, 0)
    work = f"{config.steps} steps of {config.batch_size} x {config.context_length} tokens"
    print(f"{args.run}: {work}, {threads()} threads, {args.precision}\n")
    times = ("first_step_s", "steps_s", "ms_per_step", "all_s")
    print("| library | held-out loss by seed | mean ", end="")
    print("| first step, s | other steps, s | ms a step | whole process, s |\n|---|---|---|---|---|---|---|")
    for library, runs in results.items():
        losses = [run["loss"] for run in runs]
        cells = [library, ", ".join(f"{loss:.4f}" for loss in losses), f"{np.mean(losses):.4f}"]
        cells += [f"{median(run[key] for run in runs):.1f}" for key in times]
        print(f"| {' | '.join(cells)} |")
    ratios: dict[str, Any] = {}
    for library in libraries:
        if library == "lama" or "lama" not in libraries:
            continue
        pairs = list(zip(results["lama"], results[library], strict=True))
        found = {key: [theirs[key] / ours[key] for ours, theirs in pairs] for key in ("ms_per_step", "all_s")}
        ratios[library] = found
        step, whole = (", ".join(f"{ratio:.2f}" for ratio in each) for each in found.values())
        print(f"\n{library}'s time / lama's by seed: a step {step}; the whole process {whole}")
    return {"run": args.run, "steps": config.steps, "seeds": args.seeds, "results": results, "ratios": ratios}


def one_run(args: argparse.Namespace, library: str, seed: int) -> dict[str, Any]:
    """Run one library in a separate process, timed from outside."""
    command = [sys.executable, __file__, "--run", args.run, "--child", library]
    command += ["--seeds", str(seed), "--precision", args.precision]
    for flag in ("corpus", "steps", "threads"):
        if (value := getattr(args, flag)) is not None:
            command += [f"--{flag}", str(value)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{library} failed; see above")
    return {**json.loads(done.stdout.splitlines()[-1]), "all_s": seconds}


def settings_of(args: argparse.Namespace, seed: int) -> RunConfig:
    """The preset, evaluated on the whole held-out text before the first step and after the last."""
    changes = {"seed": seed, "precision": args.precision, "evaluate_every": 0, "evaluation_tokens": 0}
    if args.steps:
        changes |= {"steps": args.steps}
    if args.corpus:
        changes |= {"corpus": [args.corpus]}
    return run_config({**read_settings(args.run), **changes})


def run_lama(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from lama.training.folder import RunFolder
    from lama.training.prepare import new_session

    config = settings_of(args, args.seeds[0])
    with tempfile.TemporaryDirectory() as folder:
        run = new_session(RunFolder(Path(folder) / "run"), asdict(config), "scripts/bench_training.py")
        run.measure_start()
        clock = Clock("lama", config)
        for event in run:
            if isinstance(event, Step):
                clock.tick(event.loss)
        return clock.figures(run.best)


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch_gpt import Trainer as TorchTrainer

    from lama.data import encode_corpus, evaluation_windows, open_corpus, split_tail

    torch.set_num_threads(threads())
    config = settings_of(args, args.seeds[0])
    corpus = open_corpus(config.corpus)
    tokenizer = make_tokenizer(config.tokenizer, corpus)
    train, validation = split_tail(encode_corpus(tokenizer, corpus.text), config.validation)
    shape = model_config(config, tokenizer.vocab_size)
    batches = language_model_batches(train, config, config.context_length)
    trainer = TorchTrainer(shape, batches, config, compiled=args.child == "torch.compile")
    held_out = evaluation_windows(validation, config.context_length)
    rows = max(1, min(config.batch_size, EVALUATION_BATCH // config.context_length, len(held_out[0])))
    trainer.evaluate(held_out, rows)
    clock = Clock(args.child, config)
    for loss, _ in trainer:
        clock.tick(loss)
    best = trainer.evaluate(held_out, rows)
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "checkpoint.pt")
    return clock.figures(best)


class Clock:
    """Times the steps, with the first, which compiles, counted separately; reports ten times a run."""

    def __init__(self, name: str, config: RunConfig):
        self.name, self.steps, self.seconds = name, config.steps, [0.0]
        self.first_loss = 0.0
        self.began = time.perf_counter()

    def tick(self, loss: float) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        done = len(self.seconds) - 1
        if done == 1:
            self.first_loss = loss
        if done % max(1, self.steps // 10) == 0:
            say(f"  {self.name}: step {done} of {self.steps}, loss {loss:.3f}, {self.seconds[-1]:.1f} s")

    def figures(self, loss: float) -> dict[str, float]:
        took = np.diff(self.seconds)
        others = took[1:] if len(took) > 1 else took
        return {
            "loss": loss,
            "first_loss": self.first_loss,
            "first_step_s": float(took[0]),
            "steps_s": float(took[1:].sum()),
            "ms_per_step": float(median(others) * 1e3),
        }


# --- steps


def compare_steps(args: argparse.Namespace, libraries: Sequence[str]) -> dict[str, Any]:
    """Measure every config with all libraries; prints the table, returns all figures."""
    figures: dict[str, Any] = {}
    for name in args.configs:
        settings = {**CONFIGS[name], "precision": args.precision}
        steps, vocab_size = args.steps or STEPS[name], VOCABULARIES.get(name, CHARACTERS)
        rounds, peaks, left_out = measure_steps(name, settings, vocab_size, libraries, args.rounds, steps)
        tokens = settings["batch_size"] * settings["context_length"]
        model = GPT(model_config(config_of(settings), vocab_size), seed=None)
        operations = tokens * training_operations(model, settings["context_length"])
        figures[name] = {"ms_per_step": rounds, "tokens_per_step": tokens, "left_out": left_out}
        figures[name] |= {"operations_per_step": operations, "peak_flops": peaks}

    print(f"{args.rounds} rounds, {threads()} threads, {args.precision}; ms a step: median (best) of the")
    print("rounds; of the limit: the model's operations over the threads' peak, measured in every round\n")
    print("| config | library | ms a step | tokens/s | time / lama's, each round | median | of the limit |")
    print("|---|---|---|---|---|---|---|")
    for name, found in figures.items():
        ours = found["ms_per_step"].get("lama")
        for library, ms in found["ms_per_step"].items():
            ratios = [theirs / mine for theirs, mine in zip(ms, ours, strict=True)] if ours else []
            found.setdefault("ratios", {})[library] = ratios
            each = "" if library == "lama" else ", ".join(f"{ratio:.2f}" for ratio in ratios)
            middle = f"{median(ratios):.2f}" if ratios else ""
            speed = found["tokens_per_step"] / median(ms) * 1e3
            times, share = f"{median(ms):.1f} ({min(ms):.1f})", share_of_peak(ms, found)
            print(f"| {name} | {library} | {times} | {speed:,.0f} | {each} | {middle} | {share} |")
    return {"rounds": args.rounds, "configs": figures}


def share_of_peak(ms: Sequence[float], figures: Mapping[str, Any]) -> str:
    """Median share of the machine's peak in the same round; empty if that could not be measured."""
    peaks, operations = figures["peak_flops"], figures["operations_per_step"]
    if None in peaks:
        return ""
    shares = [operations / (1e-3 * t) / peak for t, peak in zip(ms, peaks, strict=True)]
    return f"{median(shares):.0%} of {median(peaks) / 1e9:.0f} GFLOP/s"


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    """A config with a constant learning rate and no last step, so that all steps are alike."""
    return run_config({**settings, "steps": 1_000_000, "schedule": "constant"})


def measure_steps(
    name: str, settings: Mapping[str, Any], vocab_size: int, libraries: Sequence[str], rounds: int, steps: int
) -> tuple[dict[str, list[float]], list[float | None], dict[str, str]]:
    """(times, peaks, left out) of a config.

    `times` has each library's median milliseconds of `steps` steps in each round, `peaks` the machine's
    operations a second in each round, `left out` the reason for each library that failed.
    """
    config = config_of(settings)
    running: dict[str, Iterator[Any]] = {}
    left_out: dict[str, str] = {}
    for library in libraries:
        began = time.perf_counter()
        try:
            running[library] = trainer_of(library, config, vocab_size)
            for _ in range(3):  # the first compiles
                next(running[library])
        except Exception as error:
            if library != "torch.compile":  # it needs a C++ compiler
                raise
            running.pop(library, None)
            left_out[library] = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
            say(f"{name}: torch.compile does not work here; left out: {left_out[library]}")
            continue
        say(f"{name}: {library} is warm after {time.perf_counter() - began:.1f} s")
    found: dict[str, list[float]] = {library: [] for library in running}
    peaks: list[float | None] = []
    for i in range(rounds):
        for library, trainer in running.items():
            took = []
            for _ in range(steps):
                began = time.perf_counter()
                next(trainer)
                took.append((time.perf_counter() - began) * 1e3)
            found[library].append(median(took))
        peaks.append(peak_flops("CPU", 16 if config.precision == "bfloat16" else 32))
        each = ", ".join(f"{library} {ms[-1]:.1f} ms" for library, ms in found.items())
        peak = f"; peak {peaks[-1] / 1e9:.0f} GFLOP/s" if peaks[-1] else ""
        say(f"{name}: round {i + 1} of {rounds}: {each}{peak}")
    return found, peaks, left_out


def trainer_of(library: str, config: RunConfig, vocab_size: int, device: str = "cpu") -> Iterator[Any]:
    """An iterator over training steps; PyTorch's on `device`, lama's on tinygrad's default device."""
    shape = model_config(config, vocab_size)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 100_000)
    batches = language_model_batches(tokens, config, config.context_length)
    if library == "lama":
        return iter(Trainer(GPT(shape), batches, config))
    import torch
    from torch_gpt import Trainer as TorchTrainer

    torch.set_num_threads(threads())
    return iter(TorchTrainer(shape, batches, config, library == "torch.compile", device))


if __name__ == "__main__":
    main()
