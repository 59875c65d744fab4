"""The folder of a run: settings, log, checkpoints. The newest checkpoint is intact whenever the process ends.

lama.json                 names the command that made the folder, and locks it while a process works there
settings.toml             every setting, in a form that `lama train FILE` reads
log.jsonl                 one JSON object a line: first the model, then each step and each evaluation
recording.jsonl           with --record: attention patterns during the training
data/                     the training and held-out data, as token ids or as rows.json
model.safetensors, ...    the best model so far, for `lama generate -m`
checkpoints/step-000250/  a model's folder, with training.safetensors (the optimizer's state) and
                          training.json beside it
"""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes

from lama.atomic import clean, naming, remove, temporary, unwritable, write_atomically
from lama.checkpoints import Model, open_weights, save, write_tensors
from lama.checkpoints.fill import check_tensors
from lama.checkpoints.tensor import read_weights
from lama.data import tokens
from lama.data.tokens import META
from lama.errors import LamaError, quoted
from lama.files import checked, field, quoted_path, read_object
from lama.marker import claimed
from lama.models.adapters import trained_parameters
from lama.runtime.buffers import from_array
from lama.tokenizers import Tokenizer
from lama.training import rows
from lama.training.lines import Record, append_line, read_lines, write_lines
from lama.training.loop import Diverged
from lama.training.settings import read_settings, settings_of
from lama.training.settings.base import RunSettings, to_toml

LARGEST_LOG = 4 << 30  # bytes; a step takes 200
TYPES: dict[str, type] = {"step": int, "devices": int, "processes": int, "command": str}
TYPES |= dict.fromkeys(("config", "baselines", "shares", "about"), dict)
TYPES |= dict.fromkeys(("untrained", "loss", "learning_rate", "gradient_norm", "tokens_per_second"), float)
TYPES |= dict.fromkeys(("validation_loss", "accuracy", "margin", "best_loss", "seconds"), float)
"""Types of the values in log.jsonl and training.json."""
FILES = (
    *("log.jsonl", "recording.jsonl", "loss.png", "attention.html", "held-out.tsv"),
    *(f"data/{name}" for name in (META, *tokens.FILES, rows.FILE)),
)


class RunFolder:
    """Reads and writes one run's folder. A file appears under its name only when it is complete."""

    def __init__(self, path: Path, command: str = "train"):
        """`command` is the name that a new folder's marker gets."""
        self.path, self.command = Path(path), command
        self.data = self.path / "data"
        self.log_file = self.path / "log.jsonl"
        self.settings_file = self.path / "settings.toml"
        self.recording_file = self.path / "recording.jsonl"
        self._checkpoints = self.path / "checkpoints"
        self._locked = False

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        named = (p for p in self._checkpoints.glob("step-*") if re.fullmatch(r"step-\d{6,18}", p.name))
        return sorted((path for path in named if path.is_dir()), key=step_of)

    def is_older_run(self) -> bool:
        """Whether the folder, which has no marker, has a run of an earlier version."""
        with suppress(LamaError):
            settings_of(self.settings())
            return bool(self.checkpoints() and read_training(self.checkpoints()[-1])) or bool(self.read_log())
        return False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder against other processes. Raises LamaError as `claimed` does."""
        if self._locked:
            yield
            return
        with claimed(self.path, self.command):
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    @contextmanager
    def beginning(self, config: RunSettings, about: str) -> Iterator[Path]:
        """A temporary folder for a new run's data, which replaces an earlier run if the block succeeds.

        The earlier model stays until the new one is evaluated. After an error nothing has changed. Raises
        LamaError if the folder cannot be written.
        """
        with self.alone():
            data = temporary(self.path)
            try:
                with self._writing():
                    self.clean()
                    data.mkdir()
                with naming(data, self.data):
                    yield data
                with self._writing():
                    self._empty()
                    self.data.mkdir(exist_ok=True)
                    for path in sorted(data.iterdir(), key=lambda path: path.name == META):
                        os.replace(path, self.data / path.name)
                    self.write_settings(config, about)
            finally:
                remove(data)

    def write_settings(self, config: RunSettings, about: str) -> None:
        """Write settings.toml. Raises LamaError."""
        write_atomically(self.settings_file, to_toml(config, about).encode())

    def _empty(self) -> None:
        """Remove an earlier run, except its model and settings. Targets of links and other files stay."""
        folders = (self._checkpoints, self.data)
        for folder in folders:
            if folder.is_symlink():
                folder.unlink()
        self.drop(self.checkpoints())
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        for folder in folders:
            with suppress(OSError):
                folder.rmdir()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.path, error) from error

    def settings(self) -> dict[str, object]:
        """The settings of the run in this folder. Raises LamaError if there is none."""
        if not os.path.lexists(self.settings_file):
            advice = "Give the --out of a lama train"
            raise LamaError(f"no run to resume in {quoted_path(self.path)}: no settings.toml. {advice}")
        return read_settings(str(self.settings_file))

    def log(self, record: Mapping[str, object]) -> None:
        """Append one line. Raises LamaError if it cannot be written."""
        append_line(self.log_file, record)

    def read_log(self) -> list[Record]:
        """All records; a last line that was cut short is ignored. Raises LamaError for a damaged log."""
        if not os.path.lexists(self.log_file):
            return []
        records, source = read_lines(self.log_file, LARGEST_LOG), quoted_path(self.log_file)
        for n, record in enumerate(records, 1):
            needed = ("step",) if n > 1 or "step" in record else ("baselines", "untrained")
            check_types(record, f"line {n} of {source}", needed)
        return records

    def set_aside(self, file: Path) -> Path:
        """Rename a damaged file of the run, and return its new path. Raises LamaError."""
        names = (file.with_name(f"{file.name}.damaged{n if n > 1 else ''}") for n in count(1))
        place = next(path for path in names if not os.path.lexists(path))
        with self._writing():
            os.rename(file, place)
        return place

    def devices(self) -> int:
        """The number of devices that the run began with."""
        with suppress(LamaError):
            if found := self.checkpoints():
                return field(read_training(found[-1]), "devices", int, "training.json")
        with suppress(LamaError):  # of an earlier version
            return field(next(iter(self.read_log()), {}), "devices", int, "log.jsonl")
        return 1

    def cut_log(self, step: int) -> list[Record]:
        """Remove the records after `step`, which a resumed run repeats; return the rest. Raises LamaError."""
        rest = [record for record in self.read_log() if record.get("step", 0) <= step]
        write_lines(self.log_file, rest)
        return rest

    def save_checkpoint(
        self,
        step: int,
        model: Model,
        tokenizer: Tokenizer,
        state: Mapping[str, Tensor],
        notes: Mapping[str, object],
    ) -> None:
        """Write everything that the run needs to resume at `step`.

        Raises LamaError if it cannot be written or weights are not finite; earlier checkpoints stay intact.
        """
        place = self._checkpoints / f"step-{step:06d}"
        if place.exists():
            return  # a run is a function of its settings: the checkpoint would be the same
        for name, p in trained_parameters(model).items():
            if not np.isfinite(p.float().numpy()).all():
                raise Diverged(
                    f"weights are no longer finite after step {step} (first: {name}). Lower the learning rate"
                )
        new = temporary(self._checkpoints)
        try:
            with self._writing(), naming(new, place):
                save(new, model, tokenizer, {"steps": step})
                write_tensors(new / "training.safetensors", state)
                about = json.dumps({"step": step, **notes}, indent=1)
                write_atomically(new / "training.json", about.encode())
                if self.log_file.exists():
                    with open(self.log_file, "r+b") as log:
                        os.fsync(log.fileno())  # so that a power cut does not lose the steps up to here
                os.rename(new, place)
        finally:
            remove(new)

    def drop(self, checkpoints: Iterable[Path]) -> None:
        """Remove checkpoints. Each is renamed first, so that none is incomplete under its own name."""
        with self._writing():
            for checkpoint in checkpoints:
                trash = temporary(checkpoint.parent)
                os.rename(checkpoint, trash)
                remove(trash)

    def last_checkpoint(self) -> Path:
        """The newest checkpoint. Raises LamaError if there is none yet."""
        if not (found := self.checkpoints()):
            again = ["lama", "train", str(self.settings_file), "--out", str(self.path)]
            if (self.path / "config.json").exists():  # an earlier run's model
                again.append("--restart")
            if (devices := self.devices()) > 1:
                again += ["--devices", str(devices)]
            start = f"Start it again: {shlex.join(again)}"
            raise LamaError(f"no checkpoint to resume from in {quoted_path(self.path)}. {start}")
        return found[-1]

    def clean(self) -> None:
        """Remove files that a killed process left half-written."""
        for folder in (self.path, self._checkpoints, self.data):
            clean(folder)


class SilentFolder(RunFolder):
    """The run's folder in a process that does not write to it."""

    def checkpoints(self) -> list[Path]:
        return []

    def log(self, record: Mapping[str, object]) -> None:
        pass

    def save_checkpoint(self, step: int, *what: object) -> None:
        pass

    def drop(self, checkpoints: Iterable[Path]) -> None:
        pass


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_training(checkpoint: Path) -> Record:
    """The notes of a checkpoint on its run: step, config, data, ... Raises LamaError."""
    path = checkpoint / "training.json"
    notes, source = read_object(path), quoted_path(path)
    if (step := field(notes, "step", int, source)) != (wanted := step_of(checkpoint)):
        got = f"got step {quoted(step)}"
        raise LamaError(f"{source} must be of step {wanted}, as its folder is named; {got}")
    if not isinstance(notes.get("config"), dict):
        raise LamaError(f"{source} must hold the run's config; got {quoted(notes.get('config'))}")
    check_types(notes, source, ("step",))
    return notes


def check_types(record: Record, source: str, needed: Iterable[str]) -> None:
    """Convert values to their types. Raises LamaError for wrong types and missing values of `needed`."""
    for name in needed:
        field(record, name, TYPES[name], source)
    for name, value in record.items():
        if name in TYPES and type(value) is not TYPES[name]:
            record[name] = checked(value, TYPES[name], f"{name} in {source}")
    for table in ("baselines", "shares"):
        for name, value in record.get(table, {}).items():
            checked(value, float, f"{quoted(name, plain=True)} in {source}")


def restore(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Fill tensors with those of a checkpoint's training.safetensors. Raises LamaError."""
    path = checkpoint / "training.safetensors"
    saved = open_weights(path)
    check_tensors({name: tuple(map(int, t.shape)) for name, t in tensors.items()}, saved, path, str)
    for name, tensor in tensors.items():
        if saved[name].dtype != "float32":
            raise LamaError(f"{quoted_path(path)} must hold float32; got {saved[name].dtype} for {name}")
        tensor.replace(from_array(read_weights(saved[name], "float32"), dtypes.float32, str(tensor.device)))
