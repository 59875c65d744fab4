"""Compare lama with compiled PyTorch on a GPU: decoding, prefill and training steps, all in bfloat16.

    python scripts/bench_gpu.py [--device CUDA] [--seconds 450] [--json FILE] [--markdown FILE]

The models have random weights: GPT-2 124M, and SmolLM2-135M's shape, which is Llama's. Decoding and prefill
have weights in bfloat16; training rounds the factors of products to it, as PyTorch's autocast does. The peer
is torch_gpt.py under torch.compile, as nanoGPT trains and gpt-fast generates: with CUDA graphs, and with the
chosen token staying on the GPU. It needs lama, tinygrad and numpy, no C compiler, and a PyTorch that sees the
same GPU. If there is none, or if a part fails, the row says so.

Each piece of work has its own process. Those of one model compile at the same time; then each round runs them
in turn, so that nothing else computes. A ratio compares one round's pair; above 1, lama is faster. For
decoding, the last column is lama's memory traffic, with each weight read once for each token; else it is its
arithmetic. Work that is not ready --seconds after the start is left out. --tiny tries the script on a CPU.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_engines import Lama, bytes_read, operations
from bench_training import config_of, trainer_of
from tinygrad import Device, dtypes
from tinygrad.nn.state import get_state_dict
from workers import Answer, Worker, answer_requests, ratio, spread, table

from lama import __version__
from lama.atomic import atomic_write
from lama.cli.live import say
from lama.errors import LamaError
from lama.models.gpt import GPT, GPTConfig
from lama.runtime.device import open_device, use_device
from lama.training.budget import training_operations
from lama.training.prepare import model_config
from lama.training.settings import RunConfig

WORKS = ("decode", "prefill", "train")
LIBRARIES = ("lama", "PyTorch")
COLUMNS = ("work", "lama", "PyTorch, compiled", "ratio", "lama reached")
SIZES = {"batch_size": 4, "context_length": 1024, "bias": False, "precision": "bfloat16"}
# Settings of a run of `lama train`; GPT-2's, and SmolLM2's.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layers": 12, "n_heads": 12, "d_model": 768, **SIZES, "bias": True},
    "llama": {
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "d_model": 576,
        "d_mlp": 1536,
        "activation": "silu",
        "gated": True,
        "norm_kind": "rms",
        "positions": "rope",
        "rope_theta": 100_000.0,
        **SIZES,
    },
}
VOCABULARIES = {"gpt2": 50257, "llama": 49152}
TINY_VOCABULARY = 300
PROMPT, DECODED, STEPS = 16, 128, 3  # tokens before and in a round of decoding; steps in a round of training
WARM_UPS = 3  # rounds: the first compile and capture
TINY = {"n_layers": 2, "n_heads": 3, "d_model": 48, "d_mlp": 64, "batch_size": 2, "context_length": 32}
TORCH_DEVICES = {"CPU": "cpu", "METAL": "mps"}  # by tinygrad's name; others are PyTorch's cuda
Part = tuple[str, str]  # work, library


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", metavar="NAME", help="tinygrad's device (default: the GPU that lama would choose)")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--works", nargs="+", choices=WORKS, default=list(WORKS))
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=450, help="time for everything (default: 450)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    add("--tiny", action="store_true", help="tiny models, to try this script")
    add("--child", nargs=3, metavar="NAME", help=argparse.SUPPRESS)  # a worker's library, model and work
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {args.rounds}")
    if args.child:
        answer_requests(lambda: load(*args.child, args.device, args.tiny))
        return
    try:
        if args.device:
            use_device(args.device)
        else:
            open_device()
    except LamaError as error:
        parser.error(str(error))
    device = str(Device.DEFAULT)
    if device == "CPU" and not args.device:
        parser.error("lama finds no GPU here; give --device")
    rows, figures = compare(args, device)
    made = {"lama": __version__} | {name: version(name) for name in ("tinygrad", "torch")}
    text = (
        f"{device}; {', '.join(f'{name} {number}' for name, number in made.items())}; {args.rounds} rounds: "
    )
    text += f"medians, and in brackets the rounds' extremes\n\n{table(COLUMNS, rows)}\n"
    print(text, end="")
    about = {"device": device, "rounds": args.rounds, "versions": made, "figures": figures}
    for path, content in ((args.markdown, text), (args.json, json.dumps(about))):
        if path:
            with atomic_write(path) as file:
                file.write(content.encode())


def version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def settings_of(model: str, tiny: bool) -> tuple[RunConfig, int]:
    """The settings of a model and its training, and the size of its vocabulary."""
    if not tiny:
        return config_of(MODELS[model]), VOCABULARIES[model]
    small = TINY | ({"n_kv_heads": 1} if model == "llama" else {})
    return config_of(MODELS[model] | small), TINY_VOCABULARY


def compare(args: argparse.Namespace, device: str) -> tuple[list[list[str]], dict[str, Any]]:
    """Measure all models and works; returns the table's rows and the figures."""
    end, rows, figures = time.monotonic() + args.seconds, list[list[str]](), dict[str, Any]()
    libraries = [library for library in LIBRARIES if library == "lama" or importlib.util.find_spec("torch")]
    command = [sys.executable, __file__, "--device", device, *(["--tiny"] if args.tiny else []), "--child"]
    for name in args.models:
        reasons = {(work, "PyTorch"): "not installed" for work in args.works}
        workers: dict[Part, Worker] = {}
        try:
            for work in args.works:
                for library in libraries:
                    workers[work, library] = Worker([*command, library, name, work])
            for part in list(workers):
                workers[part].seconds = max(1.0, end - time.monotonic())
                if reason := workers[part].ready():
                    reasons[part] = reason
                    workers.pop(part).close()
                say(f"{' '.join(part)} {name}: {reason or 'ready'}; {end - time.monotonic():.0f} s are left")
            speeds = measure(name, workers, args.rounds, reasons)
        finally:
            for worker in workers.values():
                worker.close()
        shape = model_config(*settings_of(name, args.tiny))
        for work in args.works:
            rows.append(row_of(work, name, shape, speeds, reasons))
            figures[f"{work} {name}"] = {
                library: speeds.get((work, library), reasons.get((work, library))) for library in LIBRARIES
            }
    return rows, figures


def measure(
    name: str, workers: dict[Part, Worker], rounds: int, reasons: dict[Part, str]
) -> dict[Part, list[float]]:
    """Tokens/s of each worker in every round; one that fails has a reason instead."""
    speeds: dict[Part, list[float]] = {part: [] for part in workers}
    for i in range(rounds):
        for part in list(speeds):
            answer = workers[part].ask()
            if "error" in answer:
                reasons[part] = answer["error"]
                del speeds[part]
            else:
                speeds[part].append(answer["tokens_s"])
        each = ", ".join(f"{' '.join(part)} {found[-1]:,.0f}" for part, found in speeds.items())
        say(f"{name}, round {i + 1}: {each} tokens/s")
    return speeds


def row_of(
    work: str, name: str, shape: GPTConfig, speeds: dict[Part, list[float]], reasons: dict[Part, str]
) -> list[str]:
    ours, theirs = (speeds.get((work, library), []) for library in LIBRARIES)
    row = [f"{work} {name}, tokens/s"]
    for library, found in zip(LIBRARIES, (ours, theirs), strict=True):
        row.append(spread(found) if found else f"left out: {reasons[work, library]}")
    row.append(ratio([a / b for a, b in zip(ours, theirs, strict=True)]) if ours and theirs else "")
    if ours:
        model, length = GPT(shape, seed=None), shape.context_length
        each = {
            "decode": dtypes.bfloat16.itemsize / dtypes.float32.itemsize * bytes_read(model),
            "prefill": operations(model, length),
            "train": training_operations(model, length),
        }[work]
        reached = median(ours) * each
        row.append(f"{reached / 1e9:,.1f} GB/s" if work == "decode" else f"{reached / 1e12:,.2f} TFLOP/s")
    return row


# --- a worker


class LamaInBfloat16(Lama):
    """lama's model with random weights on the default device."""

    def __init__(self, shape: GPTConfig):
        model = GPT(shape)
        for weight in get_state_dict(model).values():
            weight.replace(weight.cast(dtypes.bfloat16).contiguous().realize())
        self.use(model)


def load(library: str, name: str, work: str, device: str, tiny: bool) -> Callable[[], Answer]:
    """The function that does a round of the work, warm."""
    config, vocab_size = settings_of(name, tiny)
    length = config.context_length
    torch_device = TORCH_DEVICES.get(device, "cuda")
    if library == "lama":
        use_device(device)
    if work == "train":
        which = "lama" if library == "lama" else "torch.compile"
        trainer = trainer_of(which, config, vocab_size, torch_device)
        tokens = STEPS * config.batch_size * length

        def seconds() -> float:
            began = time.perf_counter()
            for _ in range(STEPS):
                next(trainer)
            return time.perf_counter() - began

    else:
        shape = model_config(config, vocab_size)
        tokens = length if work == "prefill" else min(DECODED, length - PROMPT)
        prompt = np.random.default_rng(0).integers(0, vocab_size, length).tolist()
        engine: Any
        if library == "lama":
            engine = LamaInBfloat16(shape)
        else:
            from torch_gpt import Generator

            engine = Generator(shape, torch_device)

        def seconds() -> float:
            if work == "prefill":
                return engine.prefill(prompt)
            return engine.decode(prompt[:PROMPT], tokens)[0]

    for _ in range(WARM_UPS):
        seconds()
    return lambda: {"tokens_s": tokens / seconds()}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
