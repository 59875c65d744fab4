"""What training makes smaller."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama import kernels
from lama.dropout import Dropout, no_dropout
from lama.jit import capture_at_once
from lama.models.gpt import GPT
from lama.models.transformer import Transformer
from lama.shapes import Float, Int


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], smoothing: float = 0.0) -> Float[Tensor, ""]:
    """The mean of −log softmax(logits)[target], in nats per token; `smoothing` as in `lama.kernels.cross_entropy`."""
    return kernels.cross_entropy(logits, targets, smoothing).mean()


def language_model_loss(model: GPT, inputs: Tensor, targets: Tensor, smoothing: float = 0.0, dropout: Dropout = no_dropout) -> Tensor:
    """The cross-entropy of each next token: inputs and targets (B, T)."""
    return cross_entropy(model(inputs, dropout=dropout), targets, smoothing)


def pair_loss(
    model: Transformer,
    sources: Tensor,
    inputs: Tensor,
    targets: Tensor,
    weights: Tensor,
    smoothing: float = 0.0,
    dropout: Dropout = no_dropout,
) -> Tensor:
    """The cross-entropy of each next token of the targets, given their sources: the arrays of `lama.data.pair_arrays`.

    `weights` is 0 for padding, and such that the mean over all places is the mean over what is not.
    """
    return (kernels.cross_entropy(model(sources, inputs, dropout=dropout), targets, smoothing) * weights).mean()


class Evaluator:
    """The mean loss over arrays with N rows each, such as (inputs, targets); again and again while a model trains, compiled once,
    and once more for a last batch that is smaller than the others."""

    def __init__(self, model: Any, arrays: Sequence[np.ndarray], batch_size: int, loss: Callable[..., Tensor] = language_model_loss):
        self.arrays, self.rows = arrays, len(arrays[0])
        self.batch_size = min(batch_size, self.rows)
        self._losses = [capture_at_once(lambda *batch: loss(model, *batch).realize()) for _ in range(2)]

    def __call__(self) -> float:
        starts = range(0, self.rows, self.batch_size)
        return math.fsum(self._sum([part[i : i + self.batch_size] for part in self.arrays]) for i in starts) / self.rows

    def _sum(self, batch: Sequence[np.ndarray]) -> float:
        """Of the losses of the batch's rows."""
        rows = len(batch[0])
        return rows * float(self._losses[rows < self.batch_size](*(Tensor(part).realize() for part in batch)).item())
