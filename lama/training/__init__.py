"""Training: the loss, the schedule, the loop."""

from lama.training.loop import Step, TrainingConfig, train
from lama.training.loss import Evaluator, cross_entropy

__all__ = ["Evaluator", "Step", "TrainingConfig", "cross_entropy", "train"]
