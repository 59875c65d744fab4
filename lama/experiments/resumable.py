"""Interruptible training: it saves its state in a file, from which it resumes exactly."""

import os
import time
from collections.abc import Iterator

import numpy as np

from lama.checkpoints import open_weights
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.tensor import FileTensor
from lama.errors import LamaError
from lama.experiments.report import Options, Stopped
from lama.files import quoted_path
from lama.runtime.buffers import from_array
from lama.shapes import Array
from lama.training.loop import Step, Trainer

SECONDS = 15  # between two saves


class Resumable:
    """Iterate over a trainer's steps, and save its state with `log` and `snapshots`.

    Raises LamaError if NAME.safetensors in `options.folder` cannot be read or written, or belongs to another
    training.
    """

    def __init__(self, options: Options, name: str, trainer: Trainer, columns: int):
        self.options, self.name, self.trainer, self.columns = options, name, trainer, columns
        self.file = options.folder and options.folder / f"{name.replace(' ', '-')}.safetensors"
        self.log: list[tuple[float, ...]] = []
        """Rows of `columns` numbers."""
        self.snapshots: dict[int, dict[str, Array]] = {}
        """The weights after some of the steps, by name."""
        if self.file is not None and os.path.lexists(self.file):
            try:
                self._read({name: tensor.read() for name, tensor in open_weights(self.file).items()})
            except LamaError as error:
                raise LamaError(f"{error}. Start over with --restart") from None

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
        """Copy the current weights."""
        weights = {name: p.numpy().copy() for name, p in self.trainer.parameters.items()}
        self.snapshots[self.trainer.step] = weights

    def save(self) -> None:
        """Write the state to the file, if `options` name a folder. Raises LamaError."""
        if self.file is None:
            return
        arrays = {"step": np.array([self.trainer.step]), "log": np.array(self.log, np.float64)}
        for name, tensor in {**self.trainer.parameters, **self.trainer.optimizer.state()}.items():
            arrays[f"now.{name}"] = tensor.numpy()
        for step, weights in self.snapshots.items():
            arrays |= {f"{step}.{name}": array for name, array in weights.items()}
        write_safetensors(self.file, {name: _file_tensor(name, array) for name, array in arrays.items()})

    def _read(self, arrays: dict[str, Array]) -> None:
        now = {**self.trainer.parameters, **self.trainer.optimizer.state()}
        for name, array in arrays.items():
            step, _, parameter = name.partition(".")
            if step.isdecimal():
                self.snapshots.setdefault(int(step[:18]), {})[parameter] = array
        log, kinds = arrays.get("log"), {n: (array.dtype.name, array.shape) for n, array in arrays.items()}
        wanted = {f"now.{name}": ("float32", tuple(tensor.shape)) for name, tensor in now.items()}
        for at in self.snapshots:
            for name, tensor in self.trainer.parameters.items():
                wanted[f"{at}.{name}"] = "float32", tuple(tensor.shape)
        wanted["log"] = "float64", (len(log), self.columns) if log is not None and log.size else (0,)
        wanted["step"] = "int64", (1,)
        wrong = [name for name, kind in wanted.items() if kinds.get(name) != kind]
        if not wrong and not 0 <= arrays["step"][0] <= self.trainer.config.steps:
            wrong.append("step")
        if wrong or log is None:
            raise LamaError(f"{quoted_path(self.file)} is not this training's state: its {wrong[0]} differs")
        for name, tensor in now.items():
            tensor.replace(from_array(arrays[f"now.{name}"], tensor.dtype, str(tensor.device)))
        self.trainer.step = int(arrays["step"][0])
        self.log = [tuple(map(float, row)) for row in log]


def _file_tensor(name: str, array: Array) -> FileTensor:
    return FileTensor(name, array.dtype.name, array.shape, lambda: array)
