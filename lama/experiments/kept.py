"""A training that may be interrupted: how far it is lies in a file, and it goes on from there as if nothing had been."""

import time
from collections.abc import Iterator

import numpy as np

from lama.checkpoints import open_weights
from lama.checkpoints.fill import to_device
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.stored import StoredTensor
from lama.errors import LamaError
from lama.experiments.report import Options, Stopped
from lama.training.loop import Step, Trainer

SECONDS = 15  # between two writings of the file


class Kept:
    """Iterate over it as over `trainer`; whatever is noted of a step in `log` and `snapshots` before the next one is kept with it.

    The file NAME.safetensors in `options.folder` holds all that the training needs to go on, and all that it has noted. Raises
    LamaError where it cannot be read or written, or is another model's.
    """

    def __init__(self, options: Options, name: str, trainer: Trainer):
        self.options, self.name, self.trainer = options, name, trainer
        self.file = None if options.folder is None else options.folder / f"{name.replace(' ', '-')}.safetensors"
        self.log: list[tuple[float, ...]] = []
        """Rows of numbers, each row as long as the first."""
        self.snapshots: dict[int, dict[str, np.ndarray]] = {}
        """The weights after some of the steps, by name."""
        if self.file is not None and self.file.exists():
            self._read({name: stored.read() for name, stored in open_weights(self.file).items()})

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
        try:
            for name, tensor in now.items():
                array = arrays[f"now.{name}"]
                if array.shape != tensor.shape:
                    raise KeyError(name)
                tensor.replace(to_device(array, "float32", str(tensor.device)))
            self.trainer.step = int(arrays["step"][0])
            self.log = [tuple(map(float, row)) for row in arrays["log"]]
        except KeyError as error:
            raise LamaError(f"{self.file} must be where this training stopped; got another {error} in it. Begin anew: --restart") from None
        for name, array in arrays.items():
            step, _, parameter = name.partition(".")
            if step.isdecimal():
                self.snapshots.setdefault(int(step), {})[parameter] = array


def _stored(name: str, array: np.ndarray) -> StoredTensor:
    return StoredTensor(name, array.dtype.name, array.shape, lambda: array)
