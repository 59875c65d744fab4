"""DPO: a model learns from pairs to prefer the chosen answer to the rejected one.

The reference is the model before its first step. Its log-probabilities of the pairs are computed once and
saved in checkpoints, so that no second model is in memory. Source: Rafailov et al. 2023, equation 7.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.checkpoints.fill import DTYPES
from lama.data.packing import PackedPairs
from lama.kernels import matmul_precision
from lama.runtime.buffers import empty, write
from lama.runtime.capture import CapturedStep
from lama.shapes import Array, Float, Int
from lama.training.chat import held_out_arrays, packed_rows
from lama.training.loop import Trainer
from lama.training.loss import TokenLoss
from lama.training.run import Run

Watch = Callable[[Iterable[Any], int], Iterable[Any]]
"""A function that passes on the parts of some work, given these and their number, and may show progress."""


def unwatched(parts: Iterable[Any], total: int) -> Iterable[Any]:
    return parts


def log_ratios(
    losses: Float[Tensor, "B T"], answers: Int[Tensor, "B T"], most: int
) -> Float[Tensor, "B most"]:
    """log p(chosen) - log p(rejected) of each pair in a row of `PackedPairs`, from each token's -log p."""
    pair, answer = Tensor.arange(1, most + 1), answers.unsqueeze(-1)
    signs = (answer == pair).float() - (answer == -pair).float()  # (B, T, most)
    return -(losses.unsqueeze(-1) * signs).sum(1)


def preference_loss(
    losses: Float[Tensor, "B T"],
    answers: Int[Tensor, "B T"],
    weights: Float[Tensor, "B most"],
    reference: Float[Tensor, "B most"],
    beta: float,
) -> Float[Tensor, ""]:
    """The mean of -log sigmoid(beta · (log ratio - the reference's)) · weight. Source: equation 7."""
    margins = beta * (log_ratios(losses, answers, int(weights.shape[1])) - reference)
    return (-margins.logsigmoid() * weights).mean()


class PreferenceRun(Run):
    """A GPT's training on pairs."""

    def _trainer(self) -> Trainer:
        config, tokens = self.config, self.tokens
        train, held_out = (packed_rows(tokens, part, config) for part in ("train", "validation"))
        assert isinstance(train, PackedPairs) and isinstance(held_out, PackedPairs)
        train.most = held_out.most = most = max(train.most, held_out.most)
        self.pairs, self.held_out = train, held_out_arrays(held_out, config)
        shapes = {"train": len(train.sizes), "held_out": len(self.held_out[0]) * most}
        self.reference = {name: empty(n, device="CPU") for name, n in shapes.items()}
        """The reference's log ratios: of each training pair, and of all places for pairs in held-out rows."""
        self.has_reference = False
        ratios = TokenLoss(partial(log_ratios, most=most)).in_pieces
        # In the precision of a training step, so that the loss begins at ln 2.
        rounded = matmul_precision(DTYPES[config.precision])
        self._ratios = CapturedStep(rounded(lambda *arrays: ratios(self.model, *arrays).realize()))
        loss = TokenLoss(partial(preference_loss, beta=config.dpo))
        return Trainer(self.model, self._batch, config, loss, self.devices, self.team)

    def _batch(self, step: int) -> tuple[Array, ...]:
        if not self.has_reference and self.leads:  # the other processes of a team got it
            self.find_reference()
        size, most = self.config.batch_size, self.pairs.most
        rows = [self.pairs.row(step * size + i) for i in range(size)]
        known, reference = self.reference["train"].numpy(), np.zeros((size, most), np.float32)
        for row, found in zip(rows, reference, strict=True):
            found[: len(row)] = known[row]
        return (*self.pairs.arrays(rows), reference)

    def _ratios_of(self, arrays: Sequence[Array]) -> Array:
        """The log ratios (rows, most) of the rows of `arrays`, no more rows than a part of a batch has."""
        n, size = len(arrays[0]), self.config.batch_size // self.config.accumulation
        filled = (np.concatenate([x, np.zeros((size - n, *x.shape[1:]), x.dtype)]) for x in arrays[:4])
        found: Array = self._ratios(*(Tensor(x).realize() for x in filled)).numpy()[:n]
        return found

    def _held_out_ratios(self, watch: Watch = unwatched) -> Array:
        size = self.config.batch_size // self.config.accumulation
        firsts = range(0, len(self.held_out[0]), size)
        parts = ([x[i : i + size] for x in self.held_out] for i in firsts)
        return np.concatenate([self._ratios_of(part) for part in watch(parts, len(firsts))])

    def find_reference(self, watch: Watch = unwatched) -> None:
        """Compute the reference's log ratios of all held-out pairs and of the training pairs to be used."""
        c, pairs = self.config, self.pairs
        size = c.batch_size // c.accumulation
        n = min(c.steps * c.batch_size, len(pairs.epoch(0)))
        known = np.zeros(len(pairs.sizes), np.float32)
        firsts = range(0, n, size)
        for first in watch(firsts, len(firsts)):
            rows = [pairs.row(i) for i in range(first, min(n, first + size))]
            for row, found in zip(rows, self._ratios_of(pairs.arrays(rows)), strict=True):
                known[row] = found[: len(row)]
        write(self.reference["train"], known)
        write(self.reference["held_out"], self._held_out_ratios(watch).ravel())
        self.has_reference = True

    def measure_start(self) -> None:
        if not self.has_reference:
            self.find_reference()
        super().measure_start()

    def measure(self) -> dict[str, float]:
        """The held-out loss, the mean reward margin, and the share of pairs with a margin above 0."""
        there = self.held_out[-1] > 0
        changes = self._held_out_ratios() - self.reference["held_out"].numpy().reshape(there.shape)
        margins = self.config.dpo * changes[there].astype(np.float64)
        loss = float(np.logaddexp(0, -margins).mean())
        return {
            "validation_loss": loss,
            "margin": float(margins.mean()),
            "accuracy": float((margins > 0).mean()),
        }

    def own_state(self) -> dict[str, Tensor]:
        return super().own_state() | {f"reference.{name}": x for name, x in self.reference.items()}

    def restore(self, checkpoint: Path) -> None:
        super().restore(checkpoint)
        self.has_reference = True
