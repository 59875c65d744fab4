"""Training: settings, losses, schedule, optimizers, the loop and sessions. Names are imported lazily."""

from typing import TYPE_CHECKING

from lama.lazy import lazy_names

if TYPE_CHECKING:
    from lama.training.loop import Step, Trainer
    from lama.training.loss import Evaluator, cross_entropy
    from lama.training.settings.base import TrainingConfig

__all__ = ["Evaluator", "Step", "Trainer", "TrainingConfig", "cross_entropy"]

__getattr__ = lazy_names(
    __name__,
    {
        "Evaluator": "lama.training.loss",
        "Step": "lama.training.loop",
        "Trainer": "lama.training.loop",
        "TrainingConfig": "lama.training.settings.base",
        "cross_entropy": "lama.training.loss",
    },
)
