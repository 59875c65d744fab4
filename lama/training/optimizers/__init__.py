"""Optimizers by name. Each holds its state under the parameters' names."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from tinygrad import Tensor

from lama.training.optimizers.adamw import AdamW
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


OPTIMIZERS: dict[str, Callable[[Mapping[str, Tensor], TrainingConfig], Optimizer]] = {"adamw": AdamW}
