"""The folder of a run: settings, log, checkpoints. Whenever the process dies, the newest checkpoint in it is whole.

settings.toml             every setting, in a form that `lama train FILE` reads
recording.jsonl           with --record: what heads looked at, moment by moment
log.jsonl                 one JSON object a line: first what is trained, then each step and each evaluation
data/                     the corpus as token ids
model.safetensors, ...    the best model so far, for `gpt.py -m`
checkpoints/step-000250/  a model's folder, with training.safetensors (AdamW's m and v) and training.json beside it
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lama.checkpoints import open_weights, read_json, save, write_tensors
from lama.checkpoints.atomic import atomic_write
from lama.checkpoints.fill import check_tensors, to_device
from lama.compiler import cache_folder
from lama.errors import LamaError
from lama.tokenizers import Tokenizer
from lama.training.config import RunConfig, read_settings, to_toml
from lama.training.loop import Trainer


class Diverged(LamaError):
    """Numbers that are none any more. To go on from the checkpoint before would come to the same end."""


class RunFolder:
    """Reads and writes one run's folder. What it writes appears under its name when all of it is on the disk."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.data, self.log_file, self.settings_file = self.path / "data", self.path / "log.jsonl", self.path / "settings.toml"
        self.recording_file = self.path / "recording.jsonl"

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        names = sorted((self.path / "checkpoints").glob("step-*"))
        return sorted((path for path in names if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this machine may be in such a block for the same folder. Raises LamaError if one is."""
        locks = cache_folder() / "locks"
        lock = FileLock(locks / f"{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]}.lock", timeout=0)
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise LamaError(
                f"a run's folder must be one process's at a time; got {self.path}, where another is training. "
                "Wait for its end, or choose another --out"
            ) from None
        except OSError as error:
            raise LamaError(f"{locks} must be a folder that can be written; got {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def beginning(self, config: RunConfig, about: str) -> Iterator[Path]:
        """The place for a new run's tokens. When the block ends well, the folder is that run's, and log, data and checkpoints of
        an earlier one are gone; its model stays until the new one is judged. After an error all is as it was.

        Raises LamaError if the folder cannot be written.
        """
        made = [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
        new, data = not self.settings_file.exists(), self.path / f".data-{os.getpid()}"
        try:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                if new:  # should the process be killed from here on, the folder is known for a run's
                    self._write_settings(config, about)
                else:
                    self.clean()
            yield data
            with self._writing():
                self.drop(self.checkpoints())
                for leftover in (self.path / "checkpoints", self.data):
                    if leftover.exists():
                        shutil.rmtree(leftover)
                for old in (self.log_file, self.recording_file, self.path / "loss.png", self.path / "attention.html"):
                    old.unlink(missing_ok=True)
                os.rename(data, self.data)
                self._write_settings(config, about)
        except BaseException:
            if new:
                self.settings_file.unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(data, ignore_errors=True)
            with suppress(OSError):  # those that are not empty stay
                for folder in made:
                    folder.rmdir()

    def _write_settings(self, config: RunConfig, about: str) -> None:
        with atomic_write(self.settings_file) as file:
            file.write(to_toml(config, about).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LamaError(f"{self.path} must be a folder that can be written; got {error.strerror or error}") from error

    def settings(self) -> dict[str, Any]:
        """The settings of the run that is there. Raises LamaError where there is none."""
        if not self.settings_file.exists():
            raise LamaError(f"a run to resume must have settings.toml; got none in {self.path}. Is it the --out of a lama train?")
        return read_settings(str(self.settings_file))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises LamaError if it cannot be written."""
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise LamaError(f"{self.log_file} must be writable; got {error.strerror or error}") from error

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines: the last one may have been cut short by the end of the process."""
        return list(self._lines())

    def devices(self) -> int:
        """How many the run began with."""
        return int(next(self._lines(), {}).get("devices", 1))

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

    def save_checkpoint(self, trainer: Trainer, tokenizer: Tokenizer, notes: Mapping[str, Any]) -> Path:
        """All that the run needs to go on from `trainer.step`.

        Raises LamaError if it cannot be written, and for weights that are no longer numbers; earlier ones are then untouched.
        """
        place = self.path / "checkpoints" / f"step-{trainer.step:06d}"
        if place.exists():
            return place  # a run is a function of its settings: it would be the same again
        for name, p in trainer.parameters.items():
            if not np.isfinite(p.float().numpy()).all():
                raise Diverged(f"weights must stay numbers; got {name} with others after step {trainer.step}. Lower the learning rate")
        temporary = place.with_name(f".{place.name}-{os.getpid()}")
        try:
            with self._writing():
                save(temporary, trainer.model, tokenizer, {"steps": trainer.step})
                write_tensors(temporary / "training.safetensors", trainer.optimizer.state())
                with atomic_write(temporary / "training.json") as file:
                    file.write(json.dumps({"step": trainer.step, **notes}, indent=1).encode())
                if self.log_file.exists():
                    with open(self.log_file, "r+b") as log:
                        os.fsync(log.fileno())  # the steps up to here are not to be lost with the power
                os.rename(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return place

    def drop(self, checkpoints: Iterable[Path]) -> None:
        """Remove them; never is half of one there under its own name."""
        with self._writing():
            for checkpoint in checkpoints:
                trash = checkpoint.with_name(f".{checkpoint.name}-{os.getpid()}")
                os.rename(checkpoint, trash)
                shutil.rmtree(trash, ignore_errors=True)

    def last_checkpoint(self) -> Path:
        """Raises LamaError where there is none yet."""
        if not (found := self.checkpoints()):
            again = ["lama", "train", self.settings_file, "--out", self.path]
            if (devices := self.devices()) > 1:
                again += ["--devices", devices]
            raise LamaError(
                f"a run to resume must have a checkpoint; got none in {self.path}. Start it again: {shlex.join(map(str, again))}"
            )
        return found[-1]

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        here = (found for pattern in (".saving-*", ".data-*", ".*.tmp") for found in self.path.glob(pattern))
        for leftover in (*(self.path / "checkpoints").glob(".step-*"), *here):
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
