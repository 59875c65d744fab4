"""Log-likelihoods of tokens given the tokens before them: the basis of every evaluation here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from tinygrad import Tensor

from lama.embeddings import check_ids
from lama.errors import LamaError, UsageError
from lama.models.protocol import CausalLM
from lama.ops import cross_entropy, embedding
from lama.runtime.capture import CapturedStep
from lama.shapes import Array

BATCH_TOKENS = 2048  # in a batch; more are no faster on a CPU
LOGITS = 1 << 22  # computed at once, 16 MB: 64 positions for GPT-2, a whole batch for a model of bytes
STEP = 32  # rows are padded to multiples of this
SHAPE_TOKENS = 2048  # compiling one more width takes as long as computing this many tokens


@dataclass(frozen=True)
class Row:
    """Up to context_length + 1 tokens; the last `n_scored` are scored, each given all before it."""

    tokens: Sequence[int] | Array
    n_scored: int


@dataclass(frozen=True)
class Scores:
    """Scores of one row, with an entry for each scored token."""

    index: int
    """Index of the row."""
    log_probs: Array
    """log p(token | all before it), float32, nats."""
    greedy: Array
    """True where the token is the likeliest one."""


Progress: TypeAlias = Callable[[Iterable[Scores], int], Iterable[Scores]]
"""A wrapper of (scores, their number) that shows progress, such as tqdm."""


def unwatched(scores: Iterable[Scores], total: int) -> Iterable[Scores]:
    """The default Progress."""
    return scores


def checked_context(model: CausalLM, context_length: int | None, least: int) -> int:
    """The context length, by default the model's. Raises UsageError."""
    longest = model.config.context_length
    context_length = longest if context_length is None else context_length
    if not least <= context_length <= longest:
        limits = f"at least {least} and at most the model's {longest}"
        raise UsageError(f"context_length must be {limits}; got {context_length}")
    return context_length


class Scorer:
    """Score batches of one shape, with `width` inputs in each row, in two captured steps.

    One computes the blocks, the other the unembedding.

    Only scored positions are unembedded, a `chunk` of them at a time. GPT-2's unembedding is a third of the
    work, and the logits of a whole batch would take half a gigabyte.
    """

    def __init__(self, model: CausalLM, batch: int, width: int):
        self.model, self.batch, self.width = model, batch, width
        self.chunk = min(batch * width, 1 << max(1, LOGITS // model.config.vocab_size).bit_length() - 1)
        self._hidden = CapturedStep(lambda tokens: model.hidden(tokens).realize())
        self._score = CapturedStep(self._score_step)

    def __call__(self, rows: Sequence[Row]) -> list[tuple[Array, Array]]:
        """(log_probs, greedy) of each row."""
        # Padding comes last: no scored token sees it.
        inputs = np.zeros((self.batch, self.width), np.int32)
        for row, padded in zip(rows, inputs, strict=False):
            padded[: len(row.tokens) - 1] = row.tokens[:-1]
        # The output at the position before a token scores it.
        ends = [i * self.width + len(row.tokens) - 1 for i, row in enumerate(rows)]
        spans = [np.arange(end - row.n_scored, end) for end, row in zip(ends, rows, strict=True)]
        positions = np.concatenate(spans)
        targets = np.concatenate([row.tokens[-row.n_scored :] for row in rows])
        x = self._hidden(self._tensor(inputs))  # (batch, width, d_model)
        log_probs, greedy = np.empty(len(targets), np.float32), np.empty(len(targets), bool)
        for i in range(0, len(targets), self.chunk):
            n = min(self.chunk, len(targets) - i)
            chunk = np.zeros((2, self.chunk), np.int32)
            chunk[:, :n] = positions[i : i + n], targets[i : i + n]
            scores, hits = self._score(x, *(self._tensor(part) for part in chunk))
            log_probs[i : i + n], greedy[i : i + n] = scores.numpy()[:n], hits.numpy()[:n]
        cuts = np.cumsum([row.n_scored for row in rows])[:-1]
        return list(zip(np.split(log_probs, cuts), np.split(greedy, cuts), strict=True))

    def _score_step(self, x: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        picked = embedding(x.reshape(-1, x.shape[-1]), positions)  # (chunk, d_model): rows of x
        logits = self.model.logits(picked.unsqueeze(0)).squeeze(0).contiguous()  # (chunk, V)
        log_probs, greedy = -cross_entropy(logits, targets), logits.argmax(-1) == targets
        Tensor.realize(log_probs, greedy)
        return log_probs, greedy

    def _tensor(self, values: Array) -> Tensor:
        return Tensor(values, device=str(self.model.embed.weight.device)).realize()


def score(model: CausalLM, rows: Sequence[Row]) -> Iterator[Scores]:
    """Score every row, the longest first. Raises LamaError for unknown ids and infinite log-likelihoods."""
    for row in rows:
        check_ids(np.asarray(row.tokens), model.config.vocab_size)
    for width, indices in by_width([len(row.tokens) - 1 for row in rows], model.config.context_length):
        scorer = Scorer(model, min(len(indices), max(1, BATCH_TOKENS // width)), width)
        for start in range(0, len(indices), scorer.batch):
            batch = indices[start : start + scorer.batch]
            for i, (log_probs, greedy) in zip(batch, scorer([rows[i] for i in batch]), strict=True):
                if not np.isfinite(log_probs).all():
                    got = f"{log_probs.min()} to {log_probs.max()}"
                    raise LamaError(f"log-likelihoods are not finite: {got}. Try --dtype float32")
                yield Scores(i, log_probs, greedy)


def by_width(lengths: Sequence[int], longest: int) -> list[tuple[int, list[int]]]:
    """(width, indices of the rows that are padded to it), widest first; few widths, as each is compiled.

    A narrower width begins where the padding of the remaining rows would cost more than a compilation.
    `by_width([40, 3, 31], 64)` is `[(64, [0, 2, 1])]`; with 1,000 more rows of 3 tokens, all but the first
    get a width of 32.
    """
    groups: list[tuple[int, list[int]]] = []
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for done, i in enumerate(order):
        width = min(-(-lengths[i] // STEP) * STEP, longest)
        if not groups or (groups[-1][0] - width) * (len(order) - done) > SHAPE_TOKENS:
            groups.append((width, []))
        groups[-1][1].append(i)
    return groups
