"""The folder of a run: settings, log, checkpoints. Whenever the process dies, the newest checkpoint in it is whole.

settings.toml             every setting, in a form that `lama train FILE` reads
log.jsonl                 one JSON object a line: first what is trained, then each step and each evaluation
data/                     the corpus as token ids
model.safetensors, ...    the best model so far, for `gpt.py -m`
checkpoints/step-000250/  a model's folder, with training.safetensors (AdamW's m and v) and training.json beside it
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lama.checkpoints import open_weights, read_json, save, write_tensors
from lama.checkpoints.atomic import atomic_write
from lama.checkpoints.fill import check_tensors, to_device
from lama.errors import LamaError
from lama.tokenizers import Tokenizer
from lama.training.config import RunConfig, read_settings, to_toml
from lama.training.loop import Trainer


class RunFolder:
    """Reads and writes one run's folder. What it writes appears under its name when all of it is on the disk."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.data, self.log_file, self.settings_file = self.path / "data", self.path / "log.jsonl", self.path / "settings.toml"

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def begin(self, config: RunConfig, about: str) -> None:
        """Make the folder one of a new run: what an earlier run left of log, data and checkpoints is removed."""
        for leftover in (self.path / "checkpoints", self.data):
            if leftover.exists():
                shutil.rmtree(leftover)
        for old in (self.log_file, self.path / "loss.png"):
            old.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.settings_file) as file:
            file.write(to_toml(config, about).encode())

    def settings(self) -> dict[str, Any]:
        """The settings of the run that is there. Raises LamaError where there is none."""
        if not self.settings_file.exists():
            raise LamaError(f"a run to resume must have settings.toml; got none in {self.path}. Is it the --out of a lama train?")
        return read_settings(str(self.settings_file))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line; raises LamaError if the disk is full."""
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise LamaError(f"{self.log_file} must be writable; got {error.strerror or error}{self.last_good()}") from error

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines: the last one may have been cut short by the end of the process."""
        return list(self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self.log_file.exists():
            for line in self.log_file.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def cut_log(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run does it again."""
        kept = [record for record in self._lines() if record.get("step", 0) <= step]
        with atomic_write(self.log_file) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())

    def save_checkpoint(self, trainer: Trainer, tokenizer: Tokenizer, config: RunConfig, notes: Mapping[str, Any]) -> Path:
        """All that the run needs to go on from `trainer.step`; then drop all but the last `config.keep`.

        Raises LamaError if it cannot be written, and for weights that are no longer numbers; earlier ones are then untouched.
        """
        place = self.path / "checkpoints" / f"step-{trainer.step:06d}"
        if place.exists():
            return place  # a run is a function of its settings: it would be the same again
        for name, p in trainer.parameters.items():
            if not np.isfinite(p.float().numpy()).all():
                raise LamaError(f"weights must stay numbers; got {name} with others after step {trainer.step}{self.last_good()}")
        temporary = place.with_name(f".{place.name}-{os.getpid()}")
        try:
            save(temporary, trainer.model, tokenizer, {"steps": trainer.step})
            write_tensors(temporary / "training.safetensors", trainer.optimizer.state())
            with atomic_write(temporary / "training.json") as file:
                file.write(json.dumps({"step": trainer.step, **notes}, indent=1).encode())
            os.rename(temporary, place)
        except (OSError, LamaError) as error:
            raise LamaError(f"{error}{self.last_good()}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self.checkpoints()[: -config.keep]:
            trash = old.with_name(f".{old.name}-{os.getpid()}")
            os.rename(old, trash)  # never half of one under its own name
            shutil.rmtree(trash, ignore_errors=True)
        return place

    def last_checkpoint(self) -> Path:
        """Raises LamaError where there is none yet."""
        self.clean()
        if not (found := self.checkpoints()):
            raise LamaError(f"a run to resume must have a checkpoint; got none in {self.path / 'checkpoints'}. Start it again")
        return found[-1]

    def last_good(self) -> str:
        """The end of an error message that says where to go on from."""
        found = self.checkpoints()
        return f". The last good checkpoint is {found[-1]}: go on from there with lama train --resume {self.path}" if found else ""

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in (*(self.path / "checkpoints").glob(".step-*"), *self.path.glob(".saving-*"), *self.path.glob(".*.tmp")):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def restore(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Bring a trainer whose model was loaded from `checkpoint` to the step it was saved at; returns the notes. Raises LamaError."""
    notes = read_json(checkpoint / "training.json")
    state, stored = trainer.optimizer.state(), open_weights(checkpoint / "training.safetensors")
    check_tensors({name: tuple(map(int, t.shape)) for name, t in state.items()}, stored, checkpoint / "training.safetensors", str)
    for name, tensor in state.items():
        tensor.replace(to_device(stored[name].read(), "float32", str(tensor.device)))
    step = notes.get("step")
    if not isinstance(step, int) or step < 0:
        raise LamaError(f"{checkpoint / 'training.json'} must say at which step it was saved; got step={step!r}")
    trainer.step = step
    return notes
