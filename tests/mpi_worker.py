"""One of several processes under mpiexec: trains in a team and alone, and compares the bits.

Its arguments are the parts of a batch and the names of cases. The first process prints those that are the
same in all processes, one a line.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad.nn.state import get_state_dict

from lama.errors import LamaError
from lama.models.adapters import add_adapter
from lama.models.gpt import GPT, GPTConfig
from lama.runtime.device import open_device
from lama.training import processes
from lama.training.folder import RunFolder
from lama.training.loop import Trainer, language_model_batches
from lama.training.prepare import share_data
from lama.training.processes import Processes
from lama.training.settings.base import TrainingConfig

SHAPE = GPTConfig(61, context_length=8, d_model=16, n_layers=2, n_heads=2)
GROUPED = GPTConfig(
    61, context_length=8, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, positions="rope", tied=False
)
CASES: dict[str, tuple[GPTConfig, dict[str, Any]]] = {
    "adamw": (SHAPE, {"dropout": 0.1, "gradient_clip": 0.5}),
    "muon": (GROUPED, {"optimizer": "muon", "gradient_clip": 0.5, "dropout": 0.1}),
    "lora": (SHAPE, {"weight_decay": 0.0, "dropout": 0.1}),
    "recompute": (SHAPE, {"recompute": True, "gradient_clip": 0.0, "precision": "bfloat16"}),
}
STEPS = 5


def train(shape: GPTConfig, config: TrainingConfig, team: Processes | None) -> tuple[list[Any], Any]:
    """The numbers of all steps, and the bits of weights and state."""
    data = np.random.default_rng(0).integers(0, 61, 400).astype(np.int32)
    model = GPT(shape, seed=1)
    if config.optimizer == "adamw" and config.weight_decay == 0:
        add_adapter(model, ["blocks.0.attn.q", "blocks.1.mlp.up"], 2, 4.0, 0)
    trainer = Trainer(model, language_model_batches(data, config, 8), config, team=team)
    steps = [(step.loss, step.gradient_norm) for step in trainer]
    weights = {name: p.numpy().tobytes() for name, p in get_state_dict(model).items()}
    state = {name: t.numpy().tobytes() for name, t in trainer.state().items()}
    if team and trainer.exchange:
        assert trainer.exchange.sent > 0
    return steps, (weights, state)


def share(team: Processes, folder: Path) -> bool:
    """Whether a host with a part of the first process's data gets all."""
    team.hosts = ["a", *["b"] * (team.size - 1)]
    here = RunFolder(folder / team.hosts[team.rank])
    if team.rank == 0:
        here.data.mkdir(parents=True)
        (here.data / "train.bin").write_bytes(b"1234567")
        (here.data / "validation.bin").write_bytes(b"89")
    share_data(team, here)
    return (here.data / "train.bin").read_bytes() == b"1234567"


def refuse(team: Processes, what: str, folder: Path) -> None:
    """Do what one process must refuse, which ends all."""
    if what == "versions" and team.rank == 1:
        processes.__version__ = "0.0.7"
    try:
        team.meet()
        if what == "data" and team.rank == 1:
            (folder / "b" / "data").mkdir(parents=True)
            (folder / "b" / "data" / "train.bin").write_bytes(b"other data")
        if what == "unwritable" and team.rank == 1:
            (folder / "b").write_bytes(b"a file")
        share(team, folder)
    except LamaError as error:
        team.fail(f"process {team.rank}: {error}", error.exit_code)
    team.close(0)


def main() -> None:
    open_device()
    team = Processes(60.0)
    if sys.argv[1] == "refuse":
        refuse(team, sys.argv[2], Path(sys.argv[3]))
        return
    team.meet()
    parts = int(sys.argv[1])
    if "data" in sys.argv[3:]:
        with tempfile.TemporaryDirectory() as name:
            if team.rank == 0:
                interrupted = RunFolder(Path(name) / "b").data
                interrupted.mkdir(parents=True)
                (interrupted / "validation.bin").write_bytes(b"89")
                (interrupted / ".lama-0123456789ab").write_bytes(b"123")
            if all(team.gather(share(team, Path(team.share(name))))) and team.rank == 0:
                print("data", flush=True)
    for name in (name for name in sys.argv[2:] if name in CASES):
        shape, changes = CASES[name]
        settings = {"batch_size": 2 * parts, "accumulation": parts, "warmup": 1, "learning_rate": 1e-2}
        config = TrainingConfig(steps=STEPS, **{**settings, **changes})
        steps, (weights, state) = train(shape, config, team)
        wanted_steps, (wanted, wanted_state) = train(shape, config, None)
        same = steps == wanted_steps and weights == wanted and (team.rank > 0 or state == wanted_state)
        if all(team.gather(same)) and team.rank == 0:
            print(name, flush=True)
    team.close(0)


if __name__ == "__main__":
    main()
