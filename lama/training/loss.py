"""Training losses."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tinygrad import Tensor

from lama import ops
from lama.dropout import Dropout, no_dropout
from lama.models.encoder_decoder import Transformer
from lama.models.gpt import GPT
from lama.runtime.buffers import empty
from lama.runtime.capture import CapturedStep
from lama.shapes import Array, Float, Int

Apply = Callable[[Callable[[int], float], Iterable[int]], Iterable[float]]
LOGITS = 1 << 23  # the most logits in memory if they are computed in pieces


@dataclass(frozen=True)
class TokenLoss:
    """A loss: `reduce` of each token's cross-entropy (B, T) and of a batch's other arrays."""

    reduce: Callable[..., Tensor]

    def __call__(
        self,
        model: GPT,
        inputs: Tensor,
        targets: Tensor,
        starts: Tensor | None = None,
        *rest: Tensor | None,
        smoothing: float = 0.0,
        dropout: Dropout = no_dropout,
    ) -> Tensor:
        """Inputs and targets are (B, T); with `starts`, rows hold several texts, as in `GPT.hidden`."""
        logits = model(inputs, dropout=dropout, starts=starts)
        return self.reduce(ops.cross_entropy(logits, targets, smoothing), *rest)

    def in_pieces(
        self,
        model: GPT,
        inputs: Tensor,
        targets: Tensor,
        starts: Tensor | None = None,
        *rest: Tensor | None,
    ) -> Tensor:
        """The loss with at most LOGITS logits in memory at a time; it has no gradient."""
        rows = int(targets.numel())
        x, ids = model.hidden(inputs, starts=starts).reshape(1, rows, -1).realize(), targets.reshape(1, rows)
        losses = [
            ops.cross_entropy(model.logits(copied(x[:, piece])), ids[:, piece]).realize()
            for piece in pieces(rows, LOGITS // model.config.vocab_size)
        ]
        return self.reduce(losses[0].cat(*losses[1:], dim=1).reshape(targets.shape), *rest)


def weighted_mean(
    losses: Float[Tensor, "B T"], weights: Float[Tensor, "B T"] | None = None
) -> Float[Tensor, ""]:
    """The mean of losses, times `weights` if they are given."""
    return (losses if weights is None else losses * weights).mean()


def cross_entropy(
    logits: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
    smoothing: float = 0.0,
    weights: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """The `weighted_mean` of −log softmax(logits)[target], in nats.

    `smoothing` is as in `lama.ops.cross_entropy`.
    """
    return weighted_mean(ops.cross_entropy(logits, targets, smoothing), weights)


language_model_loss = TokenLoss(weighted_mean)
"""The mean cross-entropy of the next tokens, in nats; a batch's fourth array is their weights."""


def copied(x: Tensor) -> Tensor:
    """A realised copy of a part of a tensor, for a captured step.

    tinygrad ignores views when it plans how long such a step needs a buffer, and `contiguous` may be a view.
    """
    return empty(*map(int, x.shape), device=str(x.device)).assign(x).realize()


def pieces(rows: int, most: int) -> list[slice]:
    """Slices that divide so many rows into pieces of nearly equal length, at most `most`."""
    size = -(-rows // -(-rows // max(1, most)))
    return [slice(first, min(rows, first + size)) for first in range(0, rows, size)]


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

    The computation is compiled once, and again for a last batch that is smaller than the others.
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

    def __call__(self, apply: Apply = map) -> float:
        """The mean loss; `apply`, such as `map`, computes the losses of all batches."""
        return math.fsum(apply(self._sum, range(0, self.rows, self.batch_size))) / self.rows

    def _sum(self, first: int) -> float:
        batch = [part[first : first + self.batch_size] for part in self.arrays]
        rows = len(batch[0])
        loss = self._losses[rows < self.batch_size](*(Tensor(part).realize() for part in batch))
        return rows * float(loss.item())
