"""Compare `lama serve` with other servers: speed under load; check it with mixed traffic and broken requests.

    python scripts/bench_serve.py [--only speed,cached,load,bodies] [--llama-server PATH] [--json FILE]

speed: tokens/s of 1 to 32 concurrent streams of 64 tokens, time to the first token and between tokens. Each
server in turn gets the same prompts, which differ from the first words on. A ratio compares one round's
pair; of tokens/s, lama is faster above 1, and of times below 1. The peer is llama.cpp's own server with as
many rows, the same context and the same GGUF file; its other settings are its defaults.

cached: the time to the first token after a prompt of 1,000 tokens, new and computed before.

load: mixed requests from 64 clients, with clients that leave, read slowly or send half of a body, and wrong
requests. Every text is compared with that of `lama.generate` for the same request and seed.

bodies: requests with damaged bodies, to a small model with random weights and a chat template; each must get
an answer of 200 or 4xx.

llama.cpp: `pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36`, unpack, and in
vendor/llama.cpp: `cmake -B build -G Ninja -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
-DCMAKE_BUILD_TYPE=Release` and `ninja -C build llama-server llama-batched-bench` (the last for bench_cpu.py).
SmolLM2 is found or fetched as by `lama generate -m smollm2`; GPT-2 has random weights. Prints Markdown, and
exits with 1 if load or bodies find a fault. Measure on an otherwise idle machine.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from serve_client import Client, Server, lama_command
from serve_faults import check_bodies, check_load, random_gpt2

from lama.atomic import atomic_write
from lama.cli.live import say
from lama.host import cores

TASKS = ("speed", "cached", "load", "bodies")
MODELS = ("smollm2", "gpt2-int8", "gpt2-int4")
CONCURRENT = (1, 2, 4, 8, 16, 32)
NEW = 64  # tokens of a stream
PROMPT = "Chapter {}. Once upon a time there was a king who ruled a small island in the north and he"
LONG = 1000  # tokens of the prompt that is cached
PEER = "llama-server"
numbers = itertools.count()  # of prompts: no two are equal


@dataclass
class Figures:
    """The measurements of one round: tokens/s, and seconds to the first token and between tokens."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Tokens/s, and percentiles in milliseconds."""
        times = {"first": self.first, "between": self.gaps}
        found = {
            f"{name}_p{p}": 1000 * float(np.percentile(values, p))
            for name, values in times.items()
            for p in (50, 95)
        }
        return {"tokens_s": self.tokens / self.seconds} | found


# --- the files


def files(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """A GGUF file of each model that is named, written to `folder` where it has random weights."""
    from lama.checkpoints import export_gguf, find, load_causal

    found: dict[str, Path] = {}
    for name in names:
        if name == "smollm2":
            found[name] = Path(find("smollm2").path)
            continue
        dtype = name.removeprefix("gpt2-")
        found[name] = folder / f"{name}.gguf"
        export_gguf(found[name], *load_causal(random_gpt2(folder / "gpt2"), dtype=dtype), "random")
    return found


# --- servers


class Servers:
    """lama and the peer with one model; only one runs at a time, as waiting threads take processor time."""

    def __init__(self, args: argparse.Namespace, model: Path, rows: int, context: int, folder: Path):
        self.stack = contextlib.ExitStack()
        commands = {"lama": lama_command(model, rows, context, *args.serve_args)}
        if args.llama_server:
            peer = [args.llama_server, "-m", model, "-np", rows, "-c", rows * context, "-t", cores()]
            commands[PEER] = [*peer, "--no-webui"]
        self.running: dict[str, Server] = {}
        for name, command in commands.items():
            self.running[name] = self.stack.enter_context(Server(command, folder / f"{name}.log"))
            self.stop(name)

    def stop(self, name: str) -> None:
        self.running[name].process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self, name: str) -> Iterator[int]:
        """The port of a server, which runs meanwhile."""
        self.running[name].process.send_signal(signal.SIGCONT)
        yield self.running[name].port
        self.stop(name)

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.running.values():
            server.process.send_signal(signal.SIGCONT)
        self.stack.close()


async def stream(port: int, prompt: str | list[int], n: int, figures: Figures, cache: bool = False) -> None:
    """Stream n tokens after `prompt`; adds to `figures`."""
    client = Client(port)
    body = {"prompt": prompt, "max_tokens": n, "temperature": 0.8, "seed": next(numbers), "stream": True}
    body |= {"ignore_eos": True, "cache_prompt": cache, "stream_options": {"include_usage": True}}
    began, last, made, pieces = time.perf_counter(), 0.0, None, 0
    await client.send("/v1/completions", body)
    if await client.head() != 200:
        raise SystemExit(f"a stream must be answered with 200; got {client.status}")
    async for event in client.events():
        now = time.perf_counter()
        made = (event.get("usage") or {}).get("completion_tokens", made)
        if any(choice.get("text") for choice in event.get("choices", ())):
            if pieces:
                figures.gaps.append(now - last)
            else:
                figures.first.append(now - began)
            last, pieces = now, pieces + 1
    client.close()
    figures.tokens += made or pieces


async def streams(port: int, concurrent: int, total: int, n: int = NEW) -> Figures:
    """Measure `total` streams of n tokens, `concurrent` at a time."""
    figures, prompts = Figures(), [PROMPT.format(next(numbers)) for _ in range(total)]

    async def client() -> None:
        while prompts:
            await stream(port, prompts.pop(), n, figures)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrent)))
    figures.seconds = time.perf_counter() - began
    return figures


# --- tasks


def speed(args: argparse.Namespace, models: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    rows = []
    print("| model | streams | server | tokens/s | first token, ms: p50 | p95 | between, ms: p50 | p95 |")
    print("|---|---|---|---|---|---|---|---|")
    for model, path in models.items():
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        with Servers(args, path, max(args.concurrent), args.context, folder) as servers:
            for turn in range(args.rounds + 1):  # the first compiles and warms up
                for concurrent in args.concurrent:
                    for name in servers.running:
                        with servers.awake(name) as port:
                            work = max(2 * concurrent, 6), NEW
                            got = asyncio.run(streams(port, concurrent, *(work if turn else (concurrent, 8))))
                        if turn:
                            found.setdefault((concurrent, name), []).append(got.row())
                            say(f"{model}, {concurrent} streams, {name}: {found[concurrent, name][-1]}")
        for (concurrent, name), each in found.items():
            row = {key: median(one[key] for one in each) for key in each[0]}
            rows.append({"model": model, "streams": concurrent, "server": name} | row)
            print(f"| {model} | {concurrent} | {name} | {shown(row)} |")
            if name != "lama":
                pairs = list(zip(found[concurrent, "lama"], each, strict=True))
                ratio = {key: median(ours[key] / theirs[key] for ours, theirs in pairs) for key in row}
                rows.append({"model": model, "streams": concurrent, "server": "ratio"} | ratio)
                print(f"| {model} | {concurrent} | ratio | {shown(ratio, 2)} |", flush=True)
    return rows


def shown(row: dict[str, float], digits: int = 1) -> str:
    return " | ".join(f"{value:.{digits}f}" for value in row.values())


def cached(args: argparse.Namespace, models: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """Time the first token of new prompts, and of the same prompts with another last token."""
    rows, rng = [], np.random.default_rng(0)
    print(f"| model | server | first token after {LONG} tokens, ms | after the same, cached | ratio |")
    print("|---|---|---|---|---|")
    for model, path in models.items():
        with Servers(args, path, 2, LONG + 24, folder) as servers:
            for name in servers.running:
                new, again = Figures(), Figures()
                with servers.awake(name) as port:
                    for turn in range(args.rounds + 1):
                        prompt = rng.integers(1000, 40_000, LONG).tolist()
                        both = (new, again) if turn else (Figures(), Figures())
                        asyncio.run(stream(port, prompt, 8, both[0], cache=True))
                        asyncio.run(stream(port, [*prompt[:-1], 999], 8, both[1], cache=True))
                first, then = 1000 * median(new.first), 1000 * median(again.first)
                rows.append({"model": model, "server": name, "new": first, "cached": then})
                print(f"| {model} | {name} | {first:.1f} | {then:.1f} | {then / first:.3f} |", flush=True)
    return rows


def load(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options = {"requests": args.requests, "distinct": args.distinct, "clients": args.clients}
        report = check_load(args.model, Path(folder), args.rows, args.serve_args, **options)
    print(f"\n{json.dumps(report, indent=1)}")
    return report


def bodies(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = check_bodies(Path(folder), args.bodies, args.serve_args)
    print(f"\n{json.dumps(report, indent=1)}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(TASKS), metavar="TASKS", help=f"some of {','.join(TASKS)} (default: all)")
    add("--llama-server", metavar="PATH", help="llama.cpp's server to compare with")
    add("--models", nargs="+", choices=MODELS, default=MODELS, help="for speed and cached")
    add("--concurrent", nargs="+", type=int, default=CONCURRENT, metavar="N", help="streams at a time")
    add("--context", type=int, default=512, help="tokens of a row in speed (default: 512)")
    add("--rounds", type=int, default=3, help="for speed and cached (default: 3)")
    add("--model", default="lama-bpe", help="the model of load (default: lama-bpe)")
    add("--rows", type=int, default=8, help="rows of the server in load (default: 8)")
    add("--requests", type=int, default=10_000, help="for load (default: 10,000)")
    add("--distinct", type=int, default=1000, help="different requests of load (default: 1,000)")
    add("--clients", type=int, default=64, help="for load (default: 64)")
    add("--bodies", type=int, default=500, help="damaged bodies (default: 500)")
    add("--serve-args", nargs=argparse.REMAINDER, default=[], help="arguments of lama serve; must be last")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    tasks = args.only.split(",")
    if wrong := set(tasks) - set(TASKS):
        parser.error(f"--only must name some of {', '.join(TASKS)}; got {', '.join(sorted(wrong))}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {args.rounds}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the servers too
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = [task for task in ("speed", "cached") if task in tasks]
        models = files(args.models, folder) if measured else {}
        for task in measured:
            found[task] = {"speed": speed, "cached": cached}[task](args, models, folder)
    for task in ("load", "bodies"):
        if task in tasks:
            found[task] = {"load": load, "bodies": bodies}[task](args)
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(found, indent=1).encode())
    if any(found.get(task, {}).get("faults") for task in ("load", "bodies")):
        sys.exit(1)


if __name__ == "__main__":
    main()
