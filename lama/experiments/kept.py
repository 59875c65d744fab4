"""A training that may be interrupted: a file holds how far it is, from where it resumes exactly."""

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from lama.checkpoints import open_weights
from lama.checkpoints.fill import to_device
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.stored import StoredTensor
from lama.errors import LamaError
from lama.experiments.report import Options, Stopped
from lama.files import quoted_path
from lama.training.loop import Step, Trainer

SECONDS = 15  # between two writings of the file


class Kept:
    """Iterate over it as over `trainer`; whatever is noted of a step in `log` and `snapshots` before the next one is kept with it.

    The file NAME.safetensors in `options.folder` holds all that the training needs to go on, and all that it has noted. Raises
    LamaError where it cannot be read or written, or is another model's.
    """

    def __init__(self, options: Options, name: str, trainer: Trainer, columns: int):
        self.options, self.name, self.trainer, self.columns = options, name, trainer, columns
        self.file = None if options.folder is None else options.folder / f"{name.replace(' ', '-')}.safetensors"
        self.log: list[tuple[float, ...]] = []
        """Rows of `columns` numbers."""
        self.snapshots: dict[int, dict[str, np.ndarray]] = {}
        """The weights after some of the steps, by name."""
        if self.file is not None and os.path.lexists(self.file):
            try:
                self._read({name: stored.read() for name, stored in open_weights(self.file).items()})
            except LamaError as error:
                raise LamaError(f"{error}. Begin anew: --restart") from None

    def __iter__(self) -> Iterator[Step]:
        saved = time.monotonic()
        try:
            for step in self.options.watch(self.trainer, self.trainer.config.steps, self.name):
                yield step
                if time.monotonic() - saved > SECONDS:
                    self.save()
                    saved = time.monotonic()
        except Stopped:
            self.save()
            raise

    def snapshot(self) -> None:
        """Keep the weights as they are now."""
        self.snapshots[self.trainer.step] = {name: p.numpy().copy() for name, p in self.trainer.parameters.items()}

    def save(self) -> None:
        if self.file is None:
            return
        arrays = {"step": np.array([self.trainer.step]), "log": np.array(self.log, np.float64)}
        for name, tensor in {**self.trainer.parameters, **self.trainer.optimizer.state()}.items():
            arrays[f"now.{name}"] = tensor.numpy()
        for step, weights in self.snapshots.items():
            arrays |= {f"{step}.{name}": array for name, array in weights.items()}
        write_safetensors(self.file, {name: _stored(name, array) for name, array in arrays.items()})

    def _read(self, arrays: dict[str, np.ndarray]) -> None:
        now = {**self.trainer.parameters, **self.trainer.optimizer.state()}
        for name, array in arrays.items():
            step, _, parameter = name.partition(".")
            if step.isdecimal():
                self.snapshots.setdefault(int(step[:18]), {})[parameter] = array
        wanted = {f"now.{name}": tuple(tensor.shape) for name, tensor in now.items()}
        for at in self.snapshots:
            wanted |= {f"{at}.{name}": tuple(tensor.shape) for name, tensor in self.trainer.parameters.items()}
        wrong = [name for name, shape in wanted.items() if not _is(arrays.get(name), "float32", shape)]
        log = np.atleast_1d(arrays.get("log", np.zeros(1)))
        if not _is(log, "float64", (len(log), self.columns) if len(log) else (0,)):
            wrong.append("log")
        if not _is(arrays.get("step"), "int64", (1,)) or not 0 <= arrays["step"][0] <= self.trainer.config.steps:
            wrong.append("step")
        if wrong:
            raise LamaError(f"{quoted_path(self.file)} must be where this training stopped; got another {wrong[0]} in it")
        for name, tensor in now.items():
            tensor.replace(to_device(arrays[f"now.{name}"], "float32", str(tensor.device)))
        self.trainer.step = int(arrays["step"][0])
        self.log = [tuple(map(float, row)) for row in log]


def _is(array: np.ndarray | None, dtype: str, shape: tuple[Any, ...]) -> bool:
    return array is not None and array.dtype.name == dtype and array.shape == shape


def _stored(name: str, array: np.ndarray) -> StoredTensor:
    return StoredTensor(name, array.dtype.name, array.shape, lambda: array)
