"""Training losses."""

import math
from collections.abc import Callable, Sequence

from tinygrad import Tensor

from lama import ops
from lama.dropout import Dropout, no_dropout
from lama.models.encoder_decoder import Transformer
from lama.models.gpt import GPT
from lama.runtime.capture import CapturedStep
from lama.shapes import Array, Float, Int


def cross_entropy(
    logits: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
    smoothing: float = 0.0,
    weights: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """The mean of −log softmax(logits)[target], in nats, times `weights` where they are given.

    `smoothing` is that of `lama.ops.cross_entropy`.
    """
    losses = ops.cross_entropy(logits, targets, smoothing)
    return (losses if weights is None else losses * weights).mean()


def language_model_loss(
    model: GPT,
    inputs: Tensor,
    targets: Tensor,
    starts: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    dropout: Dropout = no_dropout,
) -> Tensor:
    """The mean cross-entropy of the next tokens: inputs and targets (B, T).

    With `starts`, rows hold several texts, as in `GPT.hidden`; with `weights` (B, T), it is the mean of
    loss x weight.
    """
    return cross_entropy(model(inputs, dropout=dropout, starts=starts), targets, smoothing, weights)


def pair_loss(
    model: Transformer,
    sources: Tensor,
    inputs: Tensor,
    targets: Tensor,
    weights: Tensor,
    smoothing: float = 0.0,
    dropout: Dropout = no_dropout,
) -> Tensor:
    """The mean cross-entropy of the targets' next tokens, for the arrays of `lama.data.pairs.pair_arrays`."""
    return cross_entropy(model(sources, inputs, dropout=dropout), targets, smoothing, weights)


class Evaluator:
    """The mean loss over arrays with N rows each, such as (inputs, targets), while a model trains.

    It is compiled once, and a second time for a last batch that is smaller than the others.
    """

    def __init__(
        self,
        model: object,
        arrays: Sequence[Array],
        batch_size: int,
        loss: Callable[..., Tensor] = language_model_loss,
    ):
        self.arrays, self.rows = arrays, len(arrays[0])
        self.batch_size = min(batch_size, self.rows)
        self._losses = [CapturedStep(lambda *batch: loss(model, *batch).realize()) for _ in range(2)]

    def __call__(self) -> float:
        starts, n = range(0, self.rows, self.batch_size), self.batch_size
        return math.fsum(self._sum([part[i : i + n] for part in self.arrays]) for i in starts) / self.rows

    def _sum(self, batch: Sequence[Array]) -> float:
        rows = len(batch[0])
        loss = self._losses[rows < self.batch_size](*(Tensor(part).realize() for part in batch))
        return rows * float(loss.item())
