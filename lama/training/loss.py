"""What training makes smaller."""

import math
from collections.abc import Iterator

import numpy as np
from tinygrad import Tensor

from lama.jit import capture_at_once
from lama.models.gpt import GPT
from lama.shapes import Float, Int


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """The mean of −log softmax(logits)[target], in nats per token; through log-softmax, so large logits are safe."""
    one_hot = targets.unsqueeze(-1) == Tensor.arange(logits.shape[-1])  # (B, T, V), never stored
    picked = one_hot.where(logits.cast("float32"), 0).sum(-1)
    return (logits.cast("float32").logsumexp(-1) - picked).mean()


class Evaluator:
    """The mean loss over (inputs, targets), each (N, T), in nats per token; again and again while a model trains, compiled once."""

    def __init__(self, model: GPT, windows: tuple[np.ndarray, np.ndarray], batch_size: int):
        self.windows, self.batch_size = windows, min(batch_size, len(windows[0]))
        self._losses = capture_at_once(lambda inputs, targets: cross_entropy(model(inputs), targets).realize())

    def __call__(self) -> float:
        inputs, targets = self.windows
        n = len(inputs) // self.batch_size * self.batch_size  # whole batches: one shape
        return math.fsum(self._run(inputs[:n], targets[:n])) / (n // self.batch_size)

    def _run(self, inputs: np.ndarray, targets: np.ndarray) -> Iterator[float]:
        for i in range(0, len(inputs), self.batch_size):
            yield float(
                self._losses(Tensor(inputs[i : i + self.batch_size]).realize(), Tensor(targets[i : i + self.batch_size]).realize()).item()
            )
