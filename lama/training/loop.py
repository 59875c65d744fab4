"""The training loop: draw a batch, step, report; an iterator, so that whoever runs it can watch, save or stop."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Context, Tensor

from lama.data import batch
from lama.errors import LamaError, UsageError
from lama.jit import capture_at_once, number
from lama.kernels import sum_of_squares
from lama.training.config import TrainingConfig
from lama.training.loss import language_model_loss
from lama.training.optimizer import AdamW
from lama.training.replica import Replica, copy_to
from lama.training.schedule import learning_rate

Batches = Callable[[int], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Step:
    """One update, as it is reported."""

    step: int
    """From 1."""
    loss: float
    """Of this step's batch before the update, nats per token."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_second: float
    """Over the last 20 steps; the first, which compiles, counts only for itself."""
    seconds_left: float


class Trainer:
    """Iterate over it to train `model`: it yields after each step, and ends after `config.steps`.

    `batches(step)` gives the arrays of one update, each (batch_size, ...); `loss(model, *arrays, smoothing, dropout)` the mean
    loss over them. `step` counts the updates done. What a run needs to go on exactly is the model's parameters,
    `optimizer.state()` and `step`: everything else, data and dropout too, is a function of the settings and the step.

    With `devices`, a copy of the model on each works through its share of the batch, all at once; the first device, where
    `model` is, sums their gradients and updates, and the others copy its weights.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        config: TrainingConfig,
        loss: Callable[..., Tensor] = language_model_loss,
        devices: Sequence[str] = (),
    ):
        shares = config.accumulation * max(1, len(devices))
        if config.batch_size % shares:
            raise UsageError(
                f"batch_size must be a multiple of devices x accumulation; got batch_size={config.batch_size}, {len(devices)} devices, "
                f"accumulation={config.accumulation}"
            )
        self.model, self.batches, self.config, self.shares = model, batches, config, shares
        self.step = 0
        models = [model, *(copy_to(model, device) for device in devices[1:])]
        self.replicas = [Replica(each, config, loss, shares) for each in models]
        self.parameters = self.replicas[0].parameters
        self.optimizer = AdamW(self.parameters, config)
        self._update = capture_at_once(self._change_weights)
        self.gain: float | None = None
        """How many times as fast the devices found the gradients together as one after the other, once that is known."""
        self._one_by_one = 0.0
        self._workers = ThreadPoolExecutor(len(self.replicas)) if devices[1:] else None

    def __iter__(self) -> Iterator[Step]:
        """Raises LamaError if the loss is no longer a number: the step is named, the weights of that step are lost."""
        durations: list[float] = []
        first = self.step
        while self.step < self.config.steps:
            began = time.perf_counter()
            rate = learning_rate(self.step, self.config)
            arrays = self.batches(self.step)
            with Context(TRAINING=1):
                loss = self._learn_from(arrays, at_once=self.step > first + 2)
                learned = time.perf_counter() - began
                norm = number(self._update(self.optimizer.scalars(self.step + 1, rate)))
            self.step += 1
            if not np.isfinite(loss) or not np.isfinite(norm):
                raise LamaError(
                    f"the loss must stay a number; got loss={loss}, gradient norm={norm} at step {self.step}. Lower the learning rate"
                )
            if self.step == first + 3:  # the first captured, the second was the first to be replayed
                self._one_by_one = learned
            elif self.step == first + 5 and self._workers:
                self.gain = self._one_by_one / learned
            durations = [*durations[-19:], time.perf_counter() - began]
            if self.step == first + 2:  # the first step compiled
                durations = durations[-1:]
            mean = sum(durations) / len(durations)
            yield Step(self.step, loss, rate, norm, arrays[0].size / mean, mean * (self.config.steps - self.step))

    def _learn_from(self, arrays: tuple[np.ndarray, ...], at_once: bool) -> float:
        """The gradients of a whole batch, part by part, on each device its share; returns the batch's mean loss."""
        seed = np.random.SeedSequence((self.config.seed, self.step)).generate_state(1)[0]
        rows = len(arrays[0]) // self.shares

        def work(device: int) -> list[float]:
            losses = []
            for i in range(self.config.accumulation):
                start = (device * self.config.accumulation + i) * rows
                key = np.array([seed, start], np.uint32)
                losses.append(self.replicas[device].add(i == 0, key, [array[start : start + rows] for array in arrays]))
            return losses

        # Capturing is one at a time: tinygrad notes what it captures in one place. Two steps more show what the devices gain.
        run = self._workers.map if self._workers and at_once else map
        return float(np.mean([loss for losses in run(work, range(len(self.replicas))) for loss in losses]))

    def _change_weights(self, scalars: Tensor) -> Tensor:
        """Clip and update; returns the gradient's global norm before clipping, shape (1,)."""
        main, *others = self.replicas
        gradients = main.gradients
        if others:
            gradients = {
                name: sum((other.gradients[name].to(main.device) for other in others), total).contiguous()
                for name, total in gradients.items()
            }
        norm, scale = clipping(list(gradients.values()), self.config.gradient_clip)
        Tensor.realize(norm, *self.optimizer.update(gradients, scalars, scale))
        for other in others:
            Tensor.realize(*(p.assign(self.parameters[name].to(other.device)) for name, p in other.parameters.items()))
        return norm


def clipping(gradients: list[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    """The gradients' global norm, and the factor that brings it to at most `limit` (0: any), each of shape (1,)."""
    norm = sum_of_squares(gradients).sqrt().contiguous()
    return norm, ((limit / (norm + 1e-6)).minimum(1.0) if limit else norm.ones_like()).contiguous()


def windows(data: np.ndarray, config: TrainingConfig, context_length: int) -> Batches:
    """The batches of a language model: random windows of `data`, token ids (n,), a function of seed and step alone."""
    return lambda step: batch(data, step, config.seed, config.batch_size, context_length)
