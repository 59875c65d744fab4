"""Training: settings, loss, schedule, optimizer, the loop, checkpoints, and a whole run. Names are imported when they are used."""

from typing import TYPE_CHECKING

from lama.lazy import lazy_names

if TYPE_CHECKING:
    from lama.training.config import RunConfig, TrainingConfig
    from lama.training.loop import Step, Trainer
    from lama.training.loss import Evaluator, cross_entropy

__all__ = ["Evaluator", "RunConfig", "Step", "Trainer", "TrainingConfig", "cross_entropy"]

__getattr__ = lazy_names(
    __name__,
    {
        "Evaluator": "lama.training.loss",
        "RunConfig": "lama.training.config",
        "Step": "lama.training.loop",
        "Trainer": "lama.training.loop",
        "TrainingConfig": "lama.training.config",
        "cross_entropy": "lama.training.loss",
    },
)
