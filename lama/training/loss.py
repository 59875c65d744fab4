"""What training makes smaller."""

import math
from collections.abc import Iterator

import numpy as np
from tinygrad import Tensor

from lama import kernels
from lama.dropout import Dropout, no_dropout
from lama.jit import capture_at_once
from lama.models.gpt import GPT
from lama.shapes import Float, Int


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], smoothing: float = 0.0) -> Float[Tensor, ""]:
    """The mean of −log softmax(logits)[target], in nats per token; `smoothing` as in `lama.kernels.cross_entropy`."""
    return kernels.cross_entropy(logits, targets, smoothing).mean()


def language_model_loss(model: GPT, inputs: Tensor, targets: Tensor, smoothing: float = 0.0, dropout: Dropout = no_dropout) -> Tensor:
    """The cross-entropy of each next token: inputs and targets (B, T)."""
    return cross_entropy(model(inputs, dropout=dropout), targets, smoothing)


class Evaluator:
    """The mean loss over (inputs, targets), each (N, T), in nats per token; again and again while a model trains, compiled once.

    Iterate over it for the losses of its batches as they come; call it for their mean.
    """

    def __init__(self, model: GPT, windows: tuple[np.ndarray, np.ndarray], batch_size: int):
        self.windows, self.batch_size = windows, min(batch_size, len(windows[0]))
        self._losses = capture_at_once(lambda inputs, targets: cross_entropy(model(inputs), targets).realize())

    def __len__(self) -> int:
        return len(self.windows[0]) // self.batch_size  # whole batches: one shape

    def __iter__(self) -> Iterator[float]:
        for i in range(0, len(self) * self.batch_size, self.batch_size):
            inputs, targets = (Tensor(part[i : i + self.batch_size]).realize() for part in self.windows)
            yield float(self._losses(inputs, targets).item())

    def __call__(self) -> float:
        return math.fsum(self) / len(self)
