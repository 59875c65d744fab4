"""Steps and seconds to nanoGPT's two figures on tiny Shakespeare, on a CPU.

    python scripts/speedrun.py [--figures 1.88 1.4697] [--seeds 0 1 2] [--corpus FILE]

The rules: the first nine tenths of the text are for training. The loss is that of the whole last tenth, in
adjacent windows of at most 64 (1.88) or 256 characters (1.4697). The model is a transformer of lama;
gradients set all of its parameters, and nothing is counted from the text. Everything else is free, and set by
a preset of lama train. The held-out loss is computed once, after the last step. For comparison, nanoGPT
reaches 1.88 in 2,000 steps of 768 tokens (the flags for a CPU in its README). It reaches 1.4697 in 5,000
steps of 16,384 (config/train_shakespeare_char.py).

Each seed runs in its own process, once with an empty cache of kernels and once with a warm one. Its seconds
are those of the whole process: imports, compilation, training, held-out loss. If other work disturbs the
clock, compare the processor time of all threads together. If PyTorch is installed (pip install lama[peers]),
nanoGPT's run for 1.88 in PyTorch is measured too, unless --no-torch is given. A Witten-Bell 5-gram model of
the text is printed for comparison.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from lama.cli.live import say
from lama.runtime.device import use_device
from lama.runtime.threads import threads
from lama.training.settings import RunConfig, read_settings, run_config


@dataclass(frozen=True)
class Figure:
    """A held-out loss to reach, in nats per character."""

    loss: float
    preset: str
    theirs: str
    """The preset with nanoGPT's settings."""
    context_length: int
    """Characters of a window, at most."""
    tokens: int
    """Characters of a step, at most."""
    steps: int
    """Steps that nanoGPT needs."""


FIGURES = {
    "1.88": Figure(1.88, "modern-char-cpu", "shakespeare-char-cpu", 64, 768, 2000),
    "1.4697": Figure(1.4697, "modern-char", "shakespeare-char", 256, 16_384, 5000),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=["1.88"], help="(default 1.88)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--corpus", metavar="FILE", default="tinyshakespeare", help="the text")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--json", action="store_true", help="also print all figures as one line of JSON")
    parser.add_argument(
        "--child", choices=("lama", "torch"), help=argparse.SUPPRESS
    )  # one run, in this process
    args = parser.parse_args(argv)
    use_device("CPU")
    if args.child:
        work = run_lama if args.child == "lama" else run_torch
        print(json.dumps(work(FIGURES[args.figures[0]], args.seeds[0], args.corpus)))
        return
    print(f"{threads()} threads; a Witten-Bell 5-gram model: {count(args.corpus):.3f} nats per character")
    found = {name: compare(name, args) for name in args.figures}
    if args.json:
        print(json.dumps(found))


def compare(name: str, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run all seeds, the libraries in turn; prints a table, returns its numbers."""
    figure = FIGURES[name]
    rows: dict[str, list[dict[str, Any]]] = {"lama, empty cache": [], "lama, warm cache": []}
    has_torch = not args.no_torch and importlib.util.find_spec("torch") is not None
    if name == "1.88" and has_torch:
        rows["nanoGPT in PyTorch"] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            database = str(Path(folder) / "cache.db")
            for label, runs in rows.items():
                library = "torch" if "PyTorch" in label else "lama"
                runs.append(one_run(library, name, seed, args.corpus, CACHEDB=database))
                say(f"{name}, {label}, seed {seed}: {runs[-1]}")
    print(f"\nto {name} nats per character, seeds {', '.join(map(str, args.seeds))}\n")
    print("| run | parameters | steps | tokens | held-out loss by seed | mean | below | s | processor, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for label, runs in rows.items():
        losses = [run["loss"] for run in runs]
        first = f"{runs[0]['parameters']:,} | {runs[0]['steps']:,} | {runs[0]['tokens']:,}"
        below = f"{sum(loss < figure.loss for loss in losses)} of {len(losses)}"
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        seconds, used = (median(run[kind] for run in runs) for kind in ("seconds", "processor_s"))
        print(f"| {label} | {first} | {each} | {mean(losses):.4f} | {below} | {seconds:.1f} | {used:.1f} |")
    *ours, theirs = rows.values()
    if name == "1.88" and has_torch:
        for label, runs in zip(rows, ours, strict=False):
            for kind, name in (("seconds", "time"), ("processor_s", "processor time")):
                pairs = zip(theirs, runs, strict=True)
                ratios = ", ".join(f"{one[kind] / other[kind]:.2f}" for one, other in pairs)
                print(f"PyTorch's {name} / that of {label}, by seed: {ratios}")
    return rows


def one_run(library: str, name: str, seed: int, corpus: str, **variables: str) -> dict[str, Any]:
    """One run in a separate process, timed from outside."""
    command = [sys.executable, __file__, "--child", library, "--figures", name, "--seeds", str(seed)]
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [*command, "--corpus", corpus], stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )
    seconds, used = time.perf_counter() - began, sum(os.times()[2:4]) - sum(before[2:4])
    if done.returncode:
        sys.exit(f"{library} failed; see above")
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds, "processor_s": used}


def settings(preset: str, figure: Figure, seed: int, corpus: str) -> RunConfig:
    """The settings of a run. Raises SystemExit if they break the rules."""
    config = run_config({**read_settings(preset), "seed": seed, "corpus": [corpus]})
    tokens = config.batch_size * config.context_length
    if config.validation != 0.1 or config.context_length > figure.context_length or tokens > figure.tokens:
        sys.exit(f"{preset} does not keep the rules")
    return config


def data_of(config: RunConfig) -> tuple[Any, Any, Any]:
    """The tokenizer, the training text, and the held-out windows."""
    from lama.data import encode_corpus, evaluation_windows, open_corpus, split_tail
    from lama.training.prepare import make_tokenizer

    corpus = open_corpus(config.corpus)
    tokenizer = make_tokenizer(config.tokenizer, corpus)
    train, held_out = split_tail(encode_corpus(tokenizer, corpus.text), config.validation)
    return tokenizer, train, evaluation_windows(held_out, config.context_length)


def rows_of(windows: Any) -> int:
    """Windows of a batch, the same for all batches: another size would be compiled again, or left out."""
    n, context = windows[0].shape
    return max(rows for rows in range(1, 16_384 // context + 1) if n % rows == 0)


def run_lama(figure: Figure, seed: int, corpus: str) -> dict[str, Any]:
    from lama.models.registry import n_parameters
    from lama.training.loop import Trainer, language_model_batches
    from lama.training.loss import Evaluator
    from lama.training.prepare import model_config, new_model

    config = settings(figure.preset, figure, seed, corpus)
    tokenizer, train, held_out = data_of(config)
    model = new_model(config, model_config(config, tokenizer.vocab_size))
    began = time.perf_counter()
    first = 0.0
    for step in Trainer(model, language_model_batches(train, config, config.context_length), config):
        if step.step == 1:
            first = time.perf_counter() - began
    trained = time.perf_counter() - began
    loss = Evaluator(model, held_out, rows_of(held_out))()
    about = {"parameters": n_parameters(model), "steps": config.steps}
    about["tokens"] = config.steps * config.batch_size * config.context_length
    return {"loss": loss, **about, "first_step_s": first, "training_s": trained}


def run_torch(figure: Figure, seed: int, corpus: str) -> dict[str, Any]:
    import torch
    from torch_gpt import Trainer

    from lama.training.loop import language_model_batches
    from lama.training.prepare import model_config

    torch.set_num_threads(threads())
    config = settings(figure.theirs, figure, seed, corpus)
    tokenizer, train, held_out = data_of(config)
    shape = model_config(config, tokenizer.vocab_size)
    batches = language_model_batches(train, config, config.context_length)
    began = time.perf_counter()
    trainer = Trainer(shape, batches, config, compiled=False)
    first = 0.0
    for n, _ in enumerate(trainer):
        if n == 0:
            first = time.perf_counter() - began
    trained = time.perf_counter() - began
    loss = trainer.evaluate(held_out, rows_of(held_out))
    about = {"parameters": sum(p.numel() for p in trainer.model.parameters()), "steps": config.steps}
    about["tokens"] = config.steps * config.batch_size * config.context_length
    return {"loss": loss, **about, "first_step_s": first, "training_s": trained}


def count(corpus: str) -> float:
    """The held-out loss of a Witten-Bell 5-gram model."""
    from lama.data import encode_corpus, open_corpus, split_tail
    from lama.data.ngrams import witten_bell_loss
    from lama.tokenizers import CharacterTokenizer

    text = open_corpus((corpus,))
    tokenizer = CharacterTokenizer(text.characters())
    train, held_out = split_tail(encode_corpus(tokenizer, text.text))
    return witten_bell_loss(train, held_out, 5, tokenizer.vocab_size)


if __name__ == "__main__":
    main()
