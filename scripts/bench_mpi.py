"""Speed of training by several processes on MPI, measured here and predicted for many hosts.

    python scripts/bench_mpi.py
    python scripts/bench_mpi.py --processes --latency 30 --gflops 2000 --tokens 4096     # predictions only

Measured: milliseconds of a step with 1, 2 and 4 processes of one thread each, and the bytes that each sends.
Also the share of the gradients' exchange that is hidden behind the backward pass. Predicted: the step of n
hosts, by the model that `predicted` describes, and how much accumulation each host needs. The model is first
compared with the steps measured here, where processes share the cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from lama.host import cores
from lama.models.gpt import GPT, GPTConfig
from lama.models.registry import n_parameters
from lama.runtime.device import open_device
from lama.tables import Table
from lama.training.exchange import bucket_names, bucket_of, owners_of
from lama.training.loop import Trainer, language_model_batches
from lama.training.processes import Processes
from lama.training.settings.base import TrainingConfig

HERE = GPTConfig(2000, context_length=128, d_model=256, n_layers=4, n_heads=4)
PARTS, ROWS = 4, 4  # of a batch, and windows in a part
SHAPES = {
    "124M": GPTConfig(50257, context_length=1024, d_model=768, n_layers=12, n_heads=12),
    "1B": GPTConfig(50257, context_length=1024, d_model=1536, n_layers=34, n_heads=16),
}
GBITS = (1, 10, 100)
HOSTS = (2, 4, 8, 16, 32, 64, 128, 256)
BACKWARD = 2 / 3  # of a part's arithmetic
WANTED = 0.8  # efficiency
UPDATED = 28  # bytes that AdamW reads and writes for a weight


@dataclass(frozen=True)
class Network:
    """A network: seconds that a message takes at least, and bytes that a host sends in a second."""

    latency: float
    speed: float


@dataclass(frozen=True)
class Work:
    """A host's arithmetic: seconds of a part of a batch, and of the optimizer's whole update."""

    part: float
    update: float


def sizes_of(shape: GPTConfig) -> dict[str, int]:
    """The numbers of each parameter, in a model's order."""
    d, h, v = shape.d_model, shape.d_mlp or 4 * shape.d_model, shape.vocab_size
    sizes = {"embed.weight": v * d, "pos_embed.weight": shape.context_length * d}
    for i in range(shape.n_layers):
        block = {"attn.qkv": 3 * d * d, "attn.out": d * d, "mlp.up": h * d, "mlp.down": h * d}
        sizes |= {f"blocks.{i}.{name}.weight": n for name, n in block.items()}
    return sizes


def traffic(sizes: dict[str, int], n: int) -> tuple[list[float], float]:
    """Bytes that the busiest of n processes sends or receives: a bucket's gradients, and all parameters."""
    owners, gradients, parameters = owners_of(sizes, n), [], 0.0
    for names in bucket_names(sizes):
        bucket = bucket_of(names, sizes, owners, n)
        owned, parts = np.diff(bucket.owned), np.diff(bucket.cuts)
        own = 0.0 if bucket.cuts == bucket.owned else 4.0 * owned.max() * (n - 1) / n
        gradients.append(4.0 * max(bucket.places[-1] - parts.min(), parts.max() * (n - 1)) + own)
        parameters += 4.0 * bucket.places[-1] * (n - 1) / n
    return gradients, parameters


def predicted(sizes: dict[str, int], work: Work, network: Network, n: int, parts: int) -> float:
    """Seconds of a step of n hosts, each with `parts` parts of the batch.

    Gradients of a bucket: n - 1 messages of equal size, and the sums to their owners. All but those of the
    last bucket may hide behind the backward pass of the last part. Parameters: n - 1 messages a bucket, after
    the update, of which each host does a share.
    """
    if n == 1:
        return parts * work.part + work.update
    gradients, parameters = traffic(sizes, n)
    each = [2 * (n - 1) * network.latency + sent / network.speed for sent in gradients]
    left = max(0.0, sum(each[:-1]) - BACKWARD * work.part) + each[-1]
    weights = len(each) * (n - 1) * network.latency + parameters / network.speed
    share = max(owned_share(sizes, n)) * work.update
    return parts * work.part + left + share + weights


def owned_share(sizes: dict[str, int], n: int) -> list[float]:
    owners, total = owners_of(sizes, n), sum(sizes.values())
    return [sum(sizes[name] for name, owner in owners.items() if owner == rank) / total for rank in range(n)]


def efficiency(sizes: dict[str, int], work: Work, network: Network, n: int, parts: int) -> float:
    """How much of n hosts' speed a step uses: 1 if it takes 1/n of one host's time for the same batch."""
    return (parts * work.part + work.update / n) / predicted(sizes, work, network, n, parts)


def accumulation_for(sizes: dict[str, int], work: Work, network: Network, n: int) -> int:
    """The smallest number of parts for each host, a power of two, with an efficiency above WANTED."""
    parts = 1
    while efficiency(sizes, work, network, n, parts) < WANTED:
        parts *= 2
    return parts


# Measured here


def worker(steps: int) -> None:
    """Train in this process and the others, and print what the first one measured."""
    open_device()
    team = Processes(300.0) if int(os.environ.get("PMI_SIZE", "1")) > 1 else None
    if team:
        team.meet()
    settings = {"batch_size": PARTS * ROWS, "accumulation": PARTS, "learning_rate": 1e-3}
    config = TrainingConfig(steps=steps + 4, **settings)
    data = np.random.default_rng(0).integers(0, HERE.vocab_size, 100_000).astype(np.int32)
    model = GPT(HERE, seed=0)
    trainer = Trainer(model, language_model_batches(data, config, HERE.context_length), config, team=team)
    parts: list[float] = []
    learn = trainer.replicas[0].learn

    def timed(*arguments: object) -> float:
        began = time.perf_counter()
        loss = learn(*arguments)  # type: ignore[arg-type]
        parts.append(time.perf_counter() - began)
        return loss

    trainer.replicas[0].learn = timed  # type: ignore[method-assign]
    seconds, sent, busy, waited, last = [], [], [], [], time.perf_counter()
    for step in trainer:
        now, exchange = time.perf_counter(), trainer.exchange
        if step.step > 4:
            seconds.append(now - last)
            if exchange:
                sent.append(exchange.sent)
                busy.append(exchange.busy)
                waited.append(exchange.waited)
        else:
            parts.clear()
        if exchange:
            exchange.sent, exchange.busy, exchange.waited = 0, 0.0, 0.0
        last = now
    found = {"step": median(seconds), "part": median(parts)}
    if team:
        found |= {"sent": median(sent), "hidden": 1 - sum(waited) / sum(busy), "busy": median(busy)}
        found |= dict(zip(("latency", "speed"), network_here(team), strict=True))
        team.close(0)
    if not team or team.rank == 0:
        print(json.dumps(found), flush=True)


def network_here(team: Processes) -> tuple[float, float]:
    """Seconds of an empty exchange among all processes, and each one's bytes a second in a large exchange."""
    comm = team.communicator()
    small, large = np.zeros(team.size, np.float32), np.zeros(1 << 21, np.float32)

    def seconds(array: np.ndarray) -> float:
        into, times = np.empty_like(array), []
        for _ in range(9):
            team.wait(comm.Ibarrier())
            began = time.perf_counter()
            team.wait(comm.Ialltoall(array, into))
            times.append(time.perf_counter() - began)
        return median(times)

    latency = seconds(small)
    return latency / (team.size - 1), large.nbytes * (team.size - 1) / team.size / (seconds(large) - latency)


def measured(n: int, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", "--steps", str(steps)]
    if n > 1:
        command = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(n), *command]
    environment = {**os.environ, "LAMA_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--latency", type=float, default=50.0, help="microseconds of a message (default 50)")
    parser.add_argument("--gflops", type=float, default=1000.0, help="GFLOP/s of a host (default 1000)")
    parser.add_argument("--memory", type=float, default=100.0, help="GB/s of a host's memory (default 100)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a part of a batch (default 1024)")
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[2, 4], help="numbers of processes; none only predicts"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps measured with each number of processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.steps)
        return
    if args.processes:
        measure(args.processes, args.steps)
    predict(args)


def measure(numbers: list[int], steps: int) -> None:
    """Print the steps of each number of processes here, beside the model's."""
    open_device()
    alone, weights, sizes = measured(1, steps), n_parameters(GPT(HERE, seed=0)), sizes_of(HERE)
    update = alone["step"] - PARTS * alone["part"]
    gflops = 6 * weights * ROWS * HERE.context_length / alone["part"] / 1e9
    columns = ["processes", "step, ms", "model, ms", "speed-up", "sent, MB", "exchange, ms", "hidden"]
    rows: list[list[object]] = [[1, 1e3 * alone["step"], "-", 1.0, "-", "-", "-"]]
    for n in numbers:
        found = measured(n, steps)
        slower = max(1.0, n / cores())
        work = Work(alone["part"] * slower, update * slower)
        network = Network(found["latency"], found["speed"])
        model = 1e3 * predicted(sizes, work, network, n, PARTS // n)
        speed_up, sent = alone["step"] / found["step"], found["sent"] / 1e6
        rows.append([n, 1e3 * found["step"], model, speed_up, sent, 1e3 * found["busy"]])
        rows[-1].append(f"{found['hidden']:.0%}")
    print(f"{weights:,} parameters, {PARTS} parts of {ROWS} x {HERE.context_length} tokens, {cores()} cores,")
    print(f"{gflops:,.0f} GFLOP/s by one thread\n")
    print(Table(columns, rows), "\n")


def predict(args: argparse.Namespace) -> None:
    """Print the efficiency of many hosts."""
    print(f"Efficiency with 8 parts of {args.tokens} tokens a host; in brackets: parts for {WANTED:.0%}.")
    print(f"Hosts of {args.gflops:,g} GFLOP/s and {args.memory:g} GB/s, {args.latency:g} us a message\n")
    for name, shape in SHAPES.items():
        sizes = sizes_of(shape)
        total = sum(sizes.values())
        part = 6e-9 * total * args.tokens / args.gflops
        work = Work(part, UPDATED * total / args.memory / 1e9)
        lines: list[list[object]] = []
        for gbit in GBITS:
            network = Network(args.latency * 1e-6, gbit * 1e9 / 8)
            cells = []
            for n in HOSTS:
                share = efficiency(sizes, work, network, n, 8)
                cells.append(f"{share:.0%} ({accumulation_for(sizes, work, network, n)})")
            lines.append([f"{name}, {gbit} Gbit/s", *cells])
        print(Table(["hosts", *map(str, HOSTS)], lines), "\n")


if __name__ == "__main__":
    main()
