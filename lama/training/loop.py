"""The training loop: an iterator over its steps, so that the caller can watch, save or stop."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.data import batch
from lama.data.windows import Mixture
from lama.errors import LamaError, UsageError
from lama.ops import square_parts
from lama.runtime.buffers import read_scalar
from lama.runtime.capture import CapturedStep
from lama.shapes import Array
from lama.training.exchange import Exchange
from lama.training.loss import language_model_loss
from lama.training.optimizers import Optimizer, joined_rows, make_optimizer
from lama.training.processes import Processes, memory_of
from lama.training.replica import Replica, copy_to
from lama.training.schedule import learning_rate
from lama.training.settings.base import TrainingConfig
from lama.training.sums import numbers_of_processes

Batches = Callable[[int], tuple[Array, ...]]


class Diverged(LamaError):
    """Training diverged: the loss or a weight is NaN or infinite. Resuming would give the same result."""


@dataclass(frozen=True)
class Step:
    """Report of one update."""

    step: int
    """The number of the update, from 1."""
    loss: float
    """The batch's loss before the update, in nats per token."""
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

    `batches(step)` gives the arrays of one update, each (batch_size, ...). `loss(model, *arrays, smoothing,
    dropout)` gives the mean loss over them. `step` counts the updates done. The model's parameters,
    `optimizer.state()` and `step` are the state of the training; data and dropout are functions of the
    settings and the step.

    With `devices`, a copy of the model on each computes its share of the batch in parallel. The first device,
    which has `model`, sums the gradients and updates; the others copy its weights. With a `team`, each
    process computes its share. All processes have the same weights, to the bit those of a single process.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        config: TrainingConfig,
        loss: Callable[..., Tensor] = language_model_loss,
        devices: Sequence[str] = (),
        team: Processes | None = None,
    ):
        check_devices(config, devices)
        check_processes(config, team)
        self.team = team
        self.exchange: Exchange | None = None
        shares = config.accumulation * max(1, len(devices))
        self.parts = config.accumulation // (team.size if team else 1)
        """The number of parts of a batch that each replica computes."""
        self.model, self.batches, self.config, self.shares = model, batches, config, shares
        self.step = 0
        models = [model, *(copy_to(model, device) for device in devices[1:])]
        self.replicas = [Replica(each, config, loss, shares, self.parts) for each in models]
        self.parameters = self.replicas[0].parameters
        self._new_optimizer = partial(make_optimizer, config=config, rows=joined_rows(model))
        self.optimizer: Optimizer = self._new_optimizer(self.parameters)
        self._update = CapturedStep(self._change_weights)
        self.gain: float | None = None
        """The speed-up of the gradients by parallel devices, once it is known."""
        self._one_by_one = 0.0
        self._workers = ThreadPoolExecutor(len(self.replicas)) if devices[1:] else None

    def __iter__(self) -> Iterator[Step]:
        """Train. Raises Diverged, which names the step, if the loss is not finite; weights are then lost."""
        durations: list[float] = []
        first = self.step
        self._share_weights()  # an earlier stage or a checkpoint may have changed them
        if self.team and not self.exchange:
            self._share_out(self.team)
        while self.step < self.config.steps:
            began = time.perf_counter()
            rate = learning_rate(self.step, self.config)
            arrays = self.batches(self.step)
            losses = self._learn_from(arrays, at_once=self.step > first + 2)
            learned = time.perf_counter() - began
            scalars = [self.optimizer.scalars(self.step + 1, rate)]
            if self.team and self.exchange:
                numbers, squares = self.exchange.squares([self.team.ask(), *losses])
                self.team.stopped, losses = int(numbers[:, 0].max()), numbers[:, 1:].reshape(-1).tolist()
                scalars.append(squares)
            norm, loss = read_scalar(self._update(*scalars)), float(np.mean(losses))
            if self.exchange:
                self.exchange.share_parameters()
            self.step += 1
            if not np.isfinite(loss) or not np.isfinite(norm):
                raise Diverged(
                    f"training diverged at step {self.step}: loss={loss}, gradient norm={norm}. "
                    "Lower the learning rate"
                )
            if self.step == first + 3:  # the first step was captured, the second was the first replay
                self._one_by_one = learned
            elif self.step == first + 5 and self._workers:
                self.gain = self._one_by_one / learned
            durations = [*durations[-19:], time.perf_counter() - began]
            if self.step == first + 2:  # the first step compiled
                durations = durations[-1:]
            mean = sum(durations) / len(durations)
            left = mean * (self.config.steps - self.step)
            yield Step(self.step, loss, rate, norm, arrays[0].size / mean, left)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state; in the first process of a team, the same as without a team."""
        if not self.exchange:
            return self.optimizer.state()
        whole = self._new_optimizer(self.parameters)
        self.exchange.move_state(whole, self.optimizer, back=True)
        return whole.state()

    def _share_out(self, team: Processes) -> None:
        """Give all processes the weights of the first one, and each its share of the optimizer's state."""
        team.copy(memory_of(self.parameters).values())
        self.exchange = Exchange(team, self.parameters, self.config.exchange == "bfloat16")
        whole, self.optimizer = self.optimizer, self._new_optimizer(self.exchange.own, share=True)
        self.exchange.move_state(whole, self.optimizer, back=False)

    def _learn_from(self, arrays: tuple[Array, ...], at_once: bool) -> list[float]:
        """Compute the gradients of this process's parts of a batch, on all devices; return their losses."""
        seed = np.random.SeedSequence((self.config.seed, self.step)).generate_state(1)[0]
        rows, rank = len(arrays[0]) // self.shares, self.team.rank if self.team else 0

        def work(device: int) -> list[float]:
            losses, replica = [], self.replicas[device]
            for i in range(self.parts):
                start = ((rank + device) * self.parts + i) * rows
                key = np.array([seed, start], np.uint32)
                part = [array[start : start + rows] for array in arrays]
                if self.exchange and i == self.parts - 1:
                    losses.append(self.exchange.learn(replica, i, key, part))
                else:
                    losses.append(replica.add(i, key, part))
            return losses

        # tinygrad can capture only one step at a time; two more steps measure the gain.
        run = self._workers.map if self._workers and at_once else map
        return [loss for losses in run(work, range(len(self.replicas))) for loss in losses]

    def _change_weights(self, scalars: Tensor, squares: Tensor | None = None) -> Tensor:
        """Clip and update; returns the gradient's global norm before clipping, shape (1,).

        `squares` are the `square_parts` of all gradients, if this process has only a share of these.
        """
        gradients = self.exchange.gradients if self.exchange else self.replicas[0].gradients
        if self.replicas[1:]:
            gradients = {name: self._sum(name) for name in gradients}
        squares = square_parts(list(gradients.values())) if squares is None else squares
        norm, scale = clipping(squares, self.config.gradient_clip)
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
    """Raise UsageError if the batch cannot be divided equally."""
    size, parts, n = config.batch_size, config.accumulation, len(devices)
    if size % (parts * max(1, n)):
        got = f"batch_size={size}, {n} devices, accumulation={parts}"
        raise UsageError(f"batch_size must be a multiple of devices x accumulation; got {got}")


def check_processes(config: TrainingConfig, team: Processes | None) -> None:
    """Raise UsageError if the parts of a batch cannot be shared as subtrees of their sum."""
    parts = config.accumulation
    if team and team.size not in (fitting := numbers_of_processes(parts)):
        fits = ", ".join(map(str, fitting))
        got = f"got {team.size}. Give one of these, or another --accumulation"
        raise UsageError(f"accumulation={parts} can be shared among {fits} processes; {got}")


def clipping(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The gradients' global norm and the factor that clips it to `limit`, unless 0; each of shape (1,).

    `squares` are their `square_parts`.
    """
    norm = squares.sum(keepdim=True).sqrt().contiguous()
    return norm, ((limit / (norm + 1e-6)).minimum(1.0) if limit else norm.ones_like()).contiguous()


def language_model_batches(
    data: Array,
    config: TrainingConfig,
    context_length: int,
    mixture: Mixture | None = None,
    ends: Array | None = None,
) -> Batches:
    """Random windows of `data`, token ids (n,), from `batch`: a function of only the seed and the step."""
    return lambda step: batch(data, step, config.seed, config.batch_size, context_length, mixture, ends)
