"""Training: settings, loss, schedule, optimizer, the loop, checkpoints, and a whole run. Names are imported when they are used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lama.training.config import RunConfig, TrainingConfig
    from lama.training.loop import Step, Trainer
    from lama.training.loss import Evaluator, cross_entropy

__all__ = ["Evaluator", "RunConfig", "Step", "Trainer", "TrainingConfig", "cross_entropy"]

_HOMES = {
    "Evaluator": "loss",
    "RunConfig": "config",
    "Step": "loop",
    "Trainer": "loop",
    "TrainingConfig": "config",
    "cross_entropy": "loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lama.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lama.training.{_HOMES[name]}"), name)
