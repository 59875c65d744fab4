"""The training loop: an iterator over its steps, so that the caller can watch, save or stop."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.data import batch
from lama.data.windows import Mixture
from lama.errors import LamaError, UsageError
from lama.ops import sum_of_squares
from lama.runtime.buffers import read_scalar
from lama.runtime.capture import CapturedStep
from lama.shapes import Array
from lama.training.loss import language_model_loss
from lama.training.optimizers import OPTIMIZERS, Optimizer, joined_rows
from lama.training.replica import Replica, copy_to
from lama.training.schedule import learning_rate
from lama.training.settings.base import TrainingConfig

Batches = Callable[[int], tuple[Array, ...]]


class Diverged(LamaError):
    """Training diverged: the loss or a weight is NaN or infinite, and would be again after a resume."""


@dataclass(frozen=True)
class Step:
    """Report of one update."""

    step: int
    """The number of the update, from 1."""
    loss: float
    """The batch's loss before the update, nats per token."""
    learning_rate: float
    gradient_norm: float
    """The gradient's global norm before clipping."""
    tokens_per_second: float
    """The mean of the last 20 steps, without the first, which compiles."""
    seconds_left: float

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for a log or a tracker."""
        return {"loss": self.loss, "learning_rate": self.learning_rate, "gradient_norm": self.gradient_norm}


class Trainer:
    """Iterate over it to train `model`: it yields after each step, and ends after `config.steps`.

    `batches(step)` gives the arrays of one update, each (batch_size, ...); `loss(model, *arrays, smoothing,
    dropout)` the mean loss over them. `step` counts the updates done. The model's parameters,
    `optimizer.state()` and `step` are the state of the training; data and dropout are functions of the
    settings and the step.

    With `devices`, a copy of the model on each computes its share of the batch in parallel; the first device,
    which has `model`, sums the gradients and updates, and the others copy its weights.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        config: TrainingConfig,
        loss: Callable[..., Tensor] = language_model_loss,
        devices: Sequence[str] = (),
    ):
        check_devices(config, devices)
        shares = config.accumulation * max(1, len(devices))
        self.model, self.batches, self.config, self.shares = model, batches, config, shares
        self.step = 0
        models = [model, *(copy_to(model, device) for device in devices[1:])]
        self.replicas = [Replica(each, config, loss, shares) for each in models]
        self.parameters = self.replicas[0].parameters
        self.optimizer: Optimizer = OPTIMIZERS[config.optimizer](self.parameters, config, joined_rows(model))
        self._update = CapturedStep(self._change_weights)
        self.gain: float | None = None
        """The speed-up of the gradients by parallel devices, once it is known."""
        self._one_by_one = 0.0
        self._workers = ThreadPoolExecutor(len(self.replicas)) if devices[1:] else None

    def __iter__(self) -> Iterator[Step]:
        """Raises Diverged, which names the step, if the loss is not finite; the weights are then lost."""
        durations: list[float] = []
        first = self.step
        self._share_weights()  # an earlier stage or a checkpoint may have changed them
        while self.step < self.config.steps:
            began = time.perf_counter()
            rate = learning_rate(self.step, self.config)
            arrays = self.batches(self.step)
            loss = self._learn_from(arrays, at_once=self.step > first + 2)
            learned = time.perf_counter() - began
            norm = read_scalar(self._update(self.optimizer.scalars(self.step + 1, rate)))
            self.step += 1
            if not np.isfinite(loss) or not np.isfinite(norm):
                raise Diverged(
                    f"the loss must stay a number; got loss={loss}, gradient norm={norm} at step "
                    f"{self.step}. Lower the learning rate"
                )
            if self.step == first + 3:  # the first step is captured, the second first replayed
                self._one_by_one = learned
            elif self.step == first + 5 and self._workers:
                self.gain = self._one_by_one / learned
            durations = [*durations[-19:], time.perf_counter() - began]
            if self.step == first + 2:  # the first step compiled
                durations = durations[-1:]
            mean = sum(durations) / len(durations)
            left = mean * (self.config.steps - self.step)
            yield Step(self.step, loss, rate, norm, arrays[0].size / mean, left)

    def _learn_from(self, arrays: tuple[Array, ...], at_once: bool) -> float:
        """Compute the gradients of a batch, part by part, on all devices; return its mean loss."""
        seed = np.random.SeedSequence((self.config.seed, self.step)).generate_state(1)[0]
        rows = len(arrays[0]) // self.shares

        def work(device: int) -> list[float]:
            losses = []
            for i in range(self.config.accumulation):
                start = (device * self.config.accumulation + i) * rows
                key = np.array([seed, start], np.uint32)
                part = [array[start : start + rows] for array in arrays]
                losses.append(self.replicas[device].add(i == 0, key, part))
            return losses

        # tinygrad can capture only one step at a time; two more steps measure the gain.
        run = self._workers.map if self._workers and at_once else map
        return float(np.mean([loss for losses in run(work, range(len(self.replicas))) for loss in losses]))

    def _change_weights(self, scalars: Tensor) -> Tensor:
        """Clip and update; returns the gradient's global norm before clipping, shape (1,)."""
        gradients = self.replicas[0].gradients
        if self.replicas[1:]:
            gradients = {name: self._sum(name) for name in gradients}
        norm, scale = clipping(list(gradients.values()), self.config.gradient_clip)
        Tensor.realize(norm, *self.optimizer.update(gradients, scalars, scale))
        self._share_weights()
        return norm

    def _sum(self, name: str) -> Tensor:
        main, *others = self.replicas
        copies = (other.gradients[name].to(main.device) for other in others)
        return sum(copies, main.gradients[name]).contiguous()

    def _share_weights(self) -> None:
        for other in self.replicas[1:]:
            copies = {name: p.to(other.device) for name, p in self.parameters.items()}
            Tensor.realize(*(p.assign(copies[name]) for name, p in other.parameters.items()))


def check_devices(config: TrainingConfig, devices: Sequence[str]) -> None:
    """Raises UsageError if the batch cannot be divided equally."""
    size, parts, n = config.batch_size, config.accumulation, len(devices)
    if size % (parts * max(1, n)):
        got = f"batch_size={size}, {n} devices, accumulation={parts}"
        raise UsageError(f"batch_size must be a multiple of devices x accumulation; got {got}")


def clipping(gradients: list[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    """The gradients' global norm and the factor that clips it to `limit`, unless 0; each of shape (1,)."""
    norm = sum_of_squares(gradients).sqrt().contiguous()
    return norm, ((limit / (norm + 1e-6)).minimum(1.0) if limit else norm.ones_like()).contiguous()


def language_model_batches(
    data: Array,
    config: TrainingConfig,
    context_length: int,
    mixture: Mixture | None = None,
    ends: Array | None = None,
) -> Batches:
    """Random windows of `data`, token ids (n,), as `batch` has them: a function of seed and step alone."""
    return lambda step: batch(data, step, config.seed, config.batch_size, context_length, mixture, ends)
