"""The folder of a run: settings, log, checkpoints. Whenever the process dies, the newest checkpoint in it is whole.

lama.json                 says that lama train made it, and is locked while one works there
settings.toml             every setting, in a form that `lama train FILE` reads
recording.jsonl           with --record: what heads looked at, moment by moment
log.jsonl                 one JSON object a line: first what is trained, then each step and each evaluation
data/                     the corpus as token ids
model.safetensors, ...    the best model so far, for `lama generate -m`
checkpoints/step-000250/  a model's folder, with training.safetensors (AdamW's m and v) and training.json beside it
"""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from lama.checkpoints import open_weights, save, write_tensors
from lama.checkpoints.atomic import atomic_write, clean, naming, remove, temporary, unwritable
from lama.checkpoints.fill import check_tensors, to_device
from lama.checkpoints.made import claimed
from lama.checkpoints.stored import read_weights
from lama.data.tokens import META
from lama.errors import LamaError, quoted
from lama.files import checked, field, parse_json_lines, quoted_path, read_file, read_object
from lama.tokenizers import Tokenizer
from lama.training.config import RunConfig, read_settings, run_config, to_toml
from lama.training.loop import Trainer

LARGEST_LOG = 4 << 30  # bytes; a step takes 200
# The types of what is read from the log and from training.json.
KINDS = {"step": int, "devices": int, "command": str, "config": dict, "baselines": dict} | dict.fromkeys(
    ("untrained", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "validation_loss", "best_loss", "seconds"), float
)


class Diverged(LamaError):
    """Training diverged: the loss or a weight is NaN or infinite, and would be again after a resume."""


class RunFolder:
    """Reads and writes one run's folder. What it writes appears under its name when all of it is on the disk."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.data, self.log_file, self.settings_file = self.path / "data", self.path / "log.jsonl", self.path / "settings.toml"
        self.recording_file, self._checkpoints = self.path / "recording.jsonl", self.path / "checkpoints"
        self._alone = False

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in self._checkpoints.glob("step-*") if re.fullmatch(r"step-[0-9]{6,18}", path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def is_older_run(self) -> bool:
        """Whether the folder, which has no marker, is that of a run of an earlier version."""
        try:
            run_config(self.settings())
            return bool(self.checkpoints() and read_training(self.checkpoints()[-1])) or bool(self.read_log())
        except LamaError:
            return False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process may be in such a block for the same folder. Raises LamaError as `claimed` does."""
        if self._alone:
            yield
            return
        with claimed(self.path, "train"):
            self._alone = True
            try:
                yield
            finally:
                self._alone = False

    @contextmanager
    def beginning(self, config: RunConfig, about: str) -> Iterator[Path]:
        """The place for a new run's tokens. When the block ends well, the folder is that run's, and log, data and checkpoints of
        an earlier one are gone; its model stays until the new one is judged. After an error all is as it was.

        Raises LamaError if the folder cannot be written.
        """
        with self.alone():
            data = temporary(self.path)
            try:
                with self._writing():
                    self.clean()
                with naming(data, self.data):
                    yield data
                with self._writing():
                    self._empty()
                    self.data.mkdir(exist_ok=True)
                    for path in sorted(data.iterdir(), key=lambda path: path.name == META):
                        os.replace(path, self.data / path.name)
                    with atomic_write(self.settings_file) as file:
                        file.write(to_toml(config, about).encode())
            finally:
                remove(data)

    def _empty(self) -> None:
        """Remove what is an earlier run's, but for its model and settings. What links lead to stays, and what else lies there."""
        for folder in (self._checkpoints, self.data):
            if folder.is_symlink():
                folder.unlink()
        self.drop(self.checkpoints())
        names = (META, "train.bin", "validation.bin")
        for old in (*(self.data / name for name in names), *(self.path / name for name in ("loss.png", "attention.html"))):
            old.unlink(missing_ok=True)
        for old in (self.log_file, self.recording_file):
            old.unlink(missing_ok=True)
        for folder in (self._checkpoints, self.data):
            with suppress(OSError):
                folder.rmdir()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.path, error) from error

    def settings(self) -> dict[str, Any]:
        """The settings of the run that is there. Raises LamaError where there is none."""
        if not os.path.lexists(self.settings_file):
            where = quoted_path(self.path)
            raise LamaError(f"a run to resume must have settings.toml; got none in {where}. Is it the --out of a lama train?")
        return read_settings(str(self.settings_file))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises LamaError if it cannot be written."""
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise LamaError(f"{quoted_path(self.log_file)} must be writable; got {error.strerror or error}") from error

    def read_log(self) -> list[dict[str, Any]]:
        """All records but a last one that the end of the process cut short. Raises LamaError for a damaged log."""
        if not os.path.lexists(self.log_file):
            return []
        *lines, _ = read_file(self.log_file, LARGEST_LOG).split(b"\n")
        source = quoted_path(self.log_file)
        records = parse_json_lines(lines, source)
        for n, record in enumerate(records, 1):
            check_kinds(record, f"line {n} of {source}", ("step",) if n > 1 or "step" in record else ("baselines", "untrained"))
        return records

    def set_aside(self, file: Path) -> Path:
        """Give a damaged file of the run another name, and return that. Raises LamaError."""
        names = (file.with_name(f"{file.name}.damaged{n if n > 1 else ''}") for n in count(1))
        place = next(path for path in names if not os.path.lexists(path))
        with self._writing():
            os.rename(file, place)
        return place

    def devices(self) -> int:
        """How many the run began with."""
        with suppress(LamaError):
            if found := self.checkpoints():
                return field(read_training(found[-1]), "devices", int, "training.json")
        with suppress(LamaError):  # of an earlier version
            return field(next(iter(self.read_log()), {}), "devices", int, "log.jsonl")
        return 1

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Forget what was logged after `step`, as a resumed run does it again; returns the rest. Raises LamaError."""
        kept = [record for record in self.read_log() if record.get("step", 0) <= step]
        with atomic_write(self.log_file) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def save_checkpoint(self, trainer: Trainer, tokenizer: Tokenizer, notes: Mapping[str, Any]) -> Path:
        """All that the run needs to go on from `trainer.step`.

        Raises LamaError if it cannot be written, and for weights that are no longer numbers; earlier ones are then untouched.
        """
        place = self._checkpoints / f"step-{trainer.step:06d}"
        if place.exists():
            return place  # a run is a function of its settings: it would be the same again
        for name, p in trainer.parameters.items():
            if not np.isfinite(p.float().numpy()).all():
                raise Diverged(f"weights must stay numbers; got {name} with others after step {trainer.step}. Lower the learning rate")
        new = temporary(self._checkpoints)
        try:
            with self._writing(), naming(new, place):
                save(new, trainer.model, tokenizer, {"steps": trainer.step})
                write_tensors(new / "training.safetensors", trainer.optimizer.state())
                with atomic_write(new / "training.json") as file:
                    file.write(json.dumps({"step": trainer.step, **notes}, indent=1).encode())
                if self.log_file.exists():
                    with open(self.log_file, "r+b") as log:
                        os.fsync(log.fileno())  # the steps up to here are not to be lost with the power
                os.rename(new, place)
        finally:
            remove(new)
        return place

    def drop(self, checkpoints: Iterable[Path]) -> None:
        """Remove them; never is half of one there under its own name."""
        with self._writing():
            for checkpoint in checkpoints:
                trash = temporary(checkpoint.parent)
                os.rename(checkpoint, trash)
                remove(trash)

    def last_checkpoint(self) -> Path:
        """Raises LamaError where there is none yet."""
        if not (found := self.checkpoints()):
            again = ["lama", "train", self.settings_file, "--out", self.path]
            again += ["--restart"] if (self.path / "config.json").exists() else []  # an earlier run's model is there
            if (devices := self.devices()) > 1:
                again += ["--devices", devices]
            raise LamaError(
                f"a run to resume must have a checkpoint; got none in {quoted_path(self.path)}. "
                f"Start it again: {shlex.join(map(str, again))}"
            )
        return found[-1]

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path, self._checkpoints, self.data):
            clean(folder)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_training(checkpoint: Path) -> dict[str, Any]:
    """The notes of a checkpoint on its run: step, config, data, ... Raises LamaError."""
    path = checkpoint / "training.json"
    notes, source = read_object(path), quoted_path(path)
    if (step := field(notes, "step", int, source)) != step_of(checkpoint):
        raise LamaError(f"{source} must be of step {step_of(checkpoint)}, as its folder is called; got step {quoted(step)}")
    if not isinstance(notes.get("config"), dict):
        raise LamaError(f"{source} must hold the run's config; got {quoted(notes.get('config'))}")
    check_kinds(notes, source, ("step",))
    return notes


def check_kinds(record: dict[str, Any], source: str, needed: Iterable[str]) -> None:
    """Give what is read its types. Raises LamaError for a value of another type, and where one of `needed` is missing."""
    for name in needed:
        field(record, name, KINDS[name], source)
    for name, value in record.items():
        if type(value) is not (kind := KINDS.get(name, type(value))):
            record[name] = checked(value, kind, f"{name} in {source}")
    for name, value in record.get("baselines", {}).items():
        checked(value, float, f"{quoted(name, plain=True)} in {source}")


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Bring a trainer whose model was loaded from `checkpoint` to the step it was saved at. Raises LamaError."""
    path = checkpoint / "training.safetensors"
    state, stored = trainer.optimizer.state(), open_weights(path)
    check_tensors({name: tuple(map(int, t.shape)) for name, t in state.items()}, stored, path, str)
    for name, tensor in state.items():
        if stored[name].dtype != "float32":
            raise LamaError(f"{quoted_path(path)} must hold float32; got {stored[name].dtype} for {name}")
        tensor.replace(to_device(read_weights(stored[name], "float32"), "float32", str(tensor.device)))
    trainer.step = step_of(checkpoint)
