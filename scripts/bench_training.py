"""Training with lama and with plain PyTorch, in turn, on the same work: whole runs, and the time of a step. On the CPU.

    python scripts/bench_training.py --run shakespeare-char-cpu [--corpus FILE] [--seeds 0 1 2]
    python scripts/bench_training.py --steps-only [--configs cpu gpu 124m] [--rounds 5]

--run trains the model of a preset from beginning to end, each run in a process of its own: held-out loss of the whole held-out
text, time of the steps, and of the whole process, with everything from the imports to the saved model. PyTorch gets the windows
and learning rates that lama gets, and its own random weights of the same distribution. lama's process also counts n-grams,
writes its log and a checkpoint.

--steps-only times steps on random tokens, some steps of each library in every round, so that all see the machine in the same
state. Prints a Markdown table of medians, with each round's ratio. Ratios above 1: lama is faster. PyTorch is there twice: as it is,
and through torch.compile, whose Inductor needs a C++ compiler; where that does not work it is left out, and a line says why.

PyTorch's code is torch_gpt.py; without PyTorch (pip install lama[peers]) only lama is run. All use all cores, or --threads.
Figures made beside other work on the machine mean nothing.
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
from lama.device import use_device
from lama.kernels.peak import peak_flops
from lama.kernels.pool import threads
from lama.models.gpt import GPT
from lama.training import Step, Trainer
from lama.training.config import RunConfig, read_settings, run_config
from lama.training.loop import windows
from lama.training.run import EVALUATION_BATCH, make_tokenizer, model_config, training_operations

# nanoGPT's flags for a CPU, its config/train_shakespeare_char.py, and GPT-2 124M in windows of 256 tokens.
CONFIGS: dict[str, dict[str, Any]] = {
    "cpu": {"n_layers": 4, "n_heads": 4, "d_model": 128, "batch_size": 12, "context_length": 64},
    "gpu": {"n_layers": 6, "n_heads": 6, "d_model": 384, "batch_size": 64, "context_length": 256, "dropout": 0.2},
    "124m": {"n_layers": 12, "n_heads": 12, "d_model": 768, "batch_size": 4, "context_length": 256, "learning_rate": 6e-4},
}
VOCABULARIES = {"124m": 50257}  # the others have the characters of tinyshakespeare
CHARACTERS = 65
STEPS = {"cpu": 50, "gpu": 2, "124m": 2}  # a round
LIBRARIES = ("lama", "torch", "torch.compile")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="PRESET", help="whole runs of a preset of lama train, or of a .toml file")
    what.add_argument("--steps-only", action="store_true", help="the time of a step")
    parser.add_argument("--corpus", metavar="FILE", help="text of --run, a file or a name (default: the preset's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one --run of each library for each (default 0 1 2)")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="of --steps-only (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="of --steps-only (default 5)")
    parser.add_argument("--steps", type=int, help="steps of a run, or of a round")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of products (PyTorch: autocast)")
    parser.add_argument("--threads", type=int, help="threads of both (default: all cores)")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, help="(default: all; of --run without torch.compile)")
    parser.add_argument("--json", action="store_true", help="all figures as one line of JSON too")
    parser.add_argument("--child", choices=LIBRARIES, help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args(argv)
    if args.threads:
        os.environ["LAMA_THREADS"] = str(args.threads)
    use_device("CPU")
    if args.child:
        print(json.dumps({"lama": run_lama, "torch": run_torch, "torch.compile": run_torch}[args.child](args)))
        return

    libraries = args.libraries or list(LIBRARIES[:2] if args.run else LIBRARIES)
    if libraries != ["lama"] and importlib.util.find_spec("torch") is None:
        libraries = [library for library in libraries if library == "lama"]
        say("PyTorch is not installed; left out")
    figures = compare_runs(args, libraries) if args.run else compare_steps(args, libraries)
    if args.json:
        print("\n" + json.dumps({"threads": threads(), "precision": args.precision, "versions": versions(libraries), **figures}))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def versions(libraries: Sequence[str]) -> dict[str, str]:
    found = {"lama": __version__, "tinygrad": importlib.metadata.version("tinygrad")}
    return found | ({"torch": importlib.metadata.version("torch")} if "torch" in libraries else {})


# --- whole runs


def compare_runs(args: argparse.Namespace, libraries: Sequence[str]) -> dict[str, Any]:
    """Runs of all libraries for one seed, then for the next; prints the table, returns all figures."""
    results: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    for seed in args.seeds:
        for library in libraries:
            result = one_run(args, library, seed)
            results[library].append(result)
            say(f"seed {seed}, {library}: held-out loss {result['loss']:.4f}, {result['steps_s']:.1f} s of {result['all_s']:.1f} s")

    config = settings_of(args, 0)
    print(
        f"{args.run}: {config.steps} steps of {config.batch_size} x {config.context_length} tokens, {threads()} threads, {args.precision}\n"
    )
    print("| library | held-out loss by seed | mean | first step, s | other steps, s | ms a step | whole process, s |")
    print("|---|---|---|---|---|---|---|")
    for library, runs in results.items():
        of = {key: [run[key] for run in runs] for key in runs[0]}
        losses = ", ".join(f"{loss:.4f}" for loss in of["loss"])
        print(
            f"| {library} | {losses} | {np.mean(of['loss']):.4f} | {median(of['first_step_s']):.1f} | {median(of['steps_s']):.1f} "
            f"| {median(of['ms_per_step']):.1f} | {median(of['all_s']):.1f} |"
        )
    ratios: dict[str, Any] = {}
    for library in libraries:
        if library == "lama" or "lama" not in libraries:
            continue
        ratios[library] = {
            key: [theirs[key] / ours[key] for ours, theirs in zip(results["lama"], results[library], strict=True)]
            for key in ("ms_per_step", "all_s")
        }
        step, whole = (", ".join(f"{ratio:.2f}" for ratio in of) for of in ratios[library].values())
        print(f"\n{library}'s time / lama's by seed: a step {step}; the whole process {whole}")
    return {"run": args.run, "steps": config.steps, "seeds": args.seeds, "results": results, "ratios": ratios}


def one_run(args: argparse.Namespace, library: str, seed: int) -> dict[str, Any]:
    """In a process of its own, timed from outside."""
    command = [sys.executable, __file__, "--run", args.run, "--child", library, "--seeds", str(seed), "--precision", args.precision]
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
    """The preset, judged on all of the held-out text, before the first step and after the last."""
    changes = {"seed": seed, "precision": args.precision, "evaluate_every": 0, "evaluation_tokens": 0}
    if args.steps:
        changes |= {"steps": args.steps}
    if args.corpus:
        changes |= {"corpus": [args.corpus]}
    return run_config({**read_settings(args.run), **changes})


def run_lama(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from lama.training.folder import RunFolder
    from lama.training.run import new_run

    config = settings_of(args, args.seeds[0])
    with tempfile.TemporaryDirectory() as folder:
        run, _ = new_run(RunFolder(Path(folder) / "run"), asdict(config), "scripts/bench_training.py")
        run.measure_start()
        clock = Clock("lama", config)
        for event in run:
            if isinstance(event, Step):
                clock.tick(event.loss)
        return clock.figures(run.best)


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch_gpt import Trainer as TorchTrainer

    from lama.data import encode_corpus, evaluation_windows, open_corpus, split

    torch.set_num_threads(threads())
    config = settings_of(args, args.seeds[0])
    corpus = open_corpus(config.corpus)
    tokenizer = make_tokenizer(config.tokenizer, corpus)
    train, validation = split(encode_corpus(tokenizer, corpus.text), config.validation)
    shape = model_config(config, tokenizer.vocab_size)
    trainer = TorchTrainer(shape, windows(train, config, config.context_length), config, compiled=args.child == "torch.compile")
    held_out = evaluation_windows(validation, config.context_length)
    rows = max(1, min(config.batch_size, EVALUATION_BATCH // config.context_length, len(held_out[0])))
    trainer.evaluate(held_out, rows)
    clock = Clock(args.child, config)
    for loss, _ in trainer:
        clock.tick(loss)
    best = trainer.evaluate(held_out, rows)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}, Path(folder) / "checkpoint.pt")
    return clock.figures(best)


class Clock:
    """The time of the steps, the first, which compiles, apart; progress ten times a run."""

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
    """Every config with all libraries in turn; prints the table, returns all figures."""
    figures: dict[str, Any] = {}
    for name in args.configs:
        settings = {**CONFIGS[name], "precision": args.precision}
        steps, vocab_size = args.steps or STEPS[name], VOCABULARIES.get(name, CHARACTERS)
        rounds, peaks, left_out = measure_steps(name, settings, vocab_size, libraries, args.rounds, steps)
        tokens = settings["batch_size"] * settings["context_length"]
        operations = tokens * training_operations(GPT(model_config(config_of(settings), vocab_size), seed=None), settings["context_length"])
        figures[name] = {"ms_per_step": rounds, "tokens_per_step": tokens, "left_out": left_out}
        figures[name] |= {"operations_per_step": operations, "peak_flops": peaks}

    print(f"{args.rounds} rounds, {threads()} threads, {args.precision}; ms a step: median (best) of the rounds; of the limit:")
    print("the model's operations over what the threads can multiply and add, measured in every round\n")
    print("| config | library | ms a step | tokens/s | time / lama's, each round | median | of the limit |\n|---|---|---|---|---|---|---|")
    for name, found in figures.items():
        ours = found["ms_per_step"].get("lama")
        for library, ms in found["ms_per_step"].items():
            ratios = [theirs / mine for theirs, mine in zip(ms, ours, strict=True)] if ours else []
            found.setdefault("ratios", {})[library] = ratios
            each = "" if library == "lama" else ", ".join(f"{ratio:.2f}" for ratio in ratios)
            middle = f"{median(ratios):.2f}" if ratios else ""
            speed = found["tokens_per_step"] / median(ms) * 1e3
            share = share_of_peak(ms, found)
            print(f"| {name} | {library} | {median(ms):.1f} ({min(ms):.1f}) | {speed:,.0f} | {each} | {middle} | {share} |")
    return {"rounds": args.rounds, "configs": figures}


def share_of_peak(ms: Sequence[float], figures: Mapping[str, Any]) -> str:
    """Of the machine's multiply-adds in the same round, the median of the rounds; empty where they could not be measured."""
    if None in figures["peak_flops"]:
        return ""
    shares = [figures["operations_per_step"] / (1e-3 * t) / peak for t, peak in zip(ms, figures["peak_flops"], strict=True)]
    return f"{median(shares):.0%} of {median(figures['peak_flops']) / 1e9:.0f} GFLOP/s"


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    """Constant rate: the schedule's end is nowhere near, and no step is unlike the others."""
    return run_config({**settings, "steps": 1_000_000, "schedule": "constant"})


def measure_steps(
    name: str, settings: Mapping[str, Any], vocab_size: int, libraries: Sequence[str], rounds: int, steps: int
) -> tuple[dict[str, list[float]], list[float | None], dict[str, str]]:
    """By library, the median time of `steps` steps in each round, in milliseconds; the machine's peak in each round, operations a
    second; and why a library was left out."""
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
        peaks.append(peak_flops("CPU"))
        each = ", ".join(f"{library} {ms[-1]:.1f} ms" for library, ms in found.items())
        say(f"{name}: round {i + 1} of {rounds}: {each}{f'; peak {peaks[-1] / 1e9:.0f} GFLOP/s' if peaks[-1] else ''}")
    return found, peaks, left_out


def trainer_of(library: str, config: RunConfig, vocab_size: int) -> Iterator[Any]:
    """An iterator that makes a step each time."""
    shape = model_config(config, vocab_size)
    batches = windows(np.random.default_rng(0).integers(0, vocab_size, 100_000), config, config.context_length)
    if library == "lama":
        return iter(Trainer(GPT(shape), batches, config))
    import torch
    from torch_gpt import Trainer as TorchTrainer

    torch.set_num_threads(threads())
    return iter(TorchTrainer(shape, batches, config, compiled=library == "torch.compile"))


if __name__ == "__main__":
    main()
