"""Optimizers by name. Each holds its state under the parameters' names."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from tinygrad import Tensor, dtypes

from lama.ops import adamw
from lama.runtime.buffers import zeros
from lama.runtime.capture import InputBuffer
from lama.training.settings.base import TrainingConfig


@runtime_checkable
class Optimizer(Protocol):
    """An update rule. One captured step serves every update: what changes is passed as `scalars`."""

    numbers_per_weight: int
    """Numbers of state for each weight."""

    def scalars(self, step: int, rate: float) -> Tensor:
        """The numbers that update `step` (from 1) at this learning rate needs: float32, realised."""

    def update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        """Assign the new parameters and state, unrealised; gradients are first multiplied by `scale`."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold."""


class AdamW:
    """AdamW, with decay on matrices and embeddings, none on biases and norms.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """

    numbers_per_weight = 2

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainingConfig):
        self.parameters, self.config = dict(parameters), config
        self.m, self.v = zeros_like_all(parameters), zeros_like_all(parameters)
        self._scalars = InputBuffer(str(next(iter(parameters.values())).device))

    def scalars(self, step: int, rate: float) -> Tensor:
        """r, 1 − β₁ᵗ and 1 − β₂ᵗ of update `step`: float32 (3,), overwritten by the next call."""
        c = self.config
        return self._scalars(np.array([rate, 1 - c.beta1**step, 1 - c.beta2**step], np.float32))

    def update(self, gradients: Mapping[str, Tensor], scalars: Tensor, scale: Tensor) -> list[Tensor]:
        c, changed = self.config, []
        for name, p in self.parameters.items():
            m, v, decay = self.m[name], self.v[name], c.weight_decay if p.ndim >= 2 else 0.0
            changed += adamw(p, m, v, gradients[name], scalars, scale, c.beta1, c.beta2, decay)
        return changed

    def state(self) -> dict[str, Tensor]:
        first = {f"m.{name}": t for name, t in self.m.items()}
        return first | {f"v.{name}": t for name, t in self.v.items()}


OPTIMIZERS: dict[str, Callable[[Mapping[str, Tensor], TrainingConfig], Optimizer]] = {"adamw": AdamW}


def zeros_like_all(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A realised buffer of zeros for each parameter, of its shape and on its device."""
    new = partial(zeros, dtype=dtypes.float32)
    return {name: new(*map(int, p.shape), device=str(p.device)) for name, p in parameters.items()}
