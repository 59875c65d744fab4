"""Training BERT to fill in masked tokens, and judging it by those of held-out text beside what counting achieves."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama import kernels
from lama.data import Corpus, encode_corpus, split
from lama.data.inputs import check_length, check_tokens, masked_input
from lama.data.masked import MASK, PAD, mask_tokens
from lama.data.windows import cut, spread
from lama.dropout import Dropout, no_dropout
from lama.errors import LamaError, UsageError
from lama.jit import capture_at_once
from lama.models.bert import Bert, BertConfig
from lama.tokenizers import BytePairTokenizer, WordPieceTokenizer, train_bpe
from lama.training.config import TrainingConfig
from lama.training.encoders import BertSettings
from lama.training.loop import Batches, Step, Trainer

MaskTokenizer = BytePairTokenizer | WordPieceTokenizer
Guesses = tuple[np.ndarray, np.ndarray, np.ndarray]  # as `mask_tokens` gives them


def special_ids(tokenizer: MaskTokenizer) -> tuple[int, int]:
    """The ids of [PAD] and [MASK]. Raises LamaError for a tokenizer without them."""
    pad, mask = tokenizer.encode(PAD), tokenizer.encode(MASK)
    if len(pad) != 1 or len(mask) != 1:
        raise LamaError(f"a tokenizer for BERT must have the tokens {PAD} and {MASK}; got one without")
    return pad[0], mask[0]


def masked_windows(data: np.ndarray, config: TrainingConfig, model: BertConfig) -> Batches:
    """Random windows of `data`, token ids (n,), and what to guess in them: a function of seed and step alone."""

    def batches(step: int) -> Guesses:
        rng = np.random.default_rng((config.seed, step))
        starts = rng.integers(len(data) - model.context_length + 1, size=config.batch_size)
        return mask_tokens(cut(data, starts, model.context_length), rng, model.mask, model.vocab_size, (model.pad,))

    return batches


def heldout_guesses(data: np.ndarray, model: BertConfig, limit: int) -> Guesses:
    """Up to `limit` windows spread evenly over `data`, and what to guess in them: always the same. Raises LamaError."""
    T = model.context_length
    if len(data) < T:
        raise LamaError(f"the held-out text must be as long as context_length; got {len(data)} tokens, context_length={T}")
    starts = spread(len(data) // T, min(len(data) // T, limit)) * T
    return mask_tokens(cut(data, starts, T), np.random.default_rng(0), model.mask, model.vocab_size, (model.pad,))


def masked_loss(
    model: Bert, seen: Tensor, positions: Tensor, targets: Tensor, smoothing: float = 0.0, dropout: Dropout = no_dropout
) -> Tensor:
    """The mean cross-entropy of the chosen tokens, nats; targets of -1 count for nothing."""
    losses = kernels.cross_entropy(model.at(seen, positions, dropout=dropout), targets.maximum(0), smoothing)  # (B, n)
    there = targets >= 0
    return there.where(losses, 0).sum() / there.sum().maximum(1)


@dataclass(frozen=True)
class MaskedScore:
    loss: float
    """Nats for each token that was to be guessed."""
    accuracy: float
    """How often the likeliest token is the right one."""


class MaskedEvaluator:
    """The score on fixed guesses, again and again while a model trains, compiled once."""

    def __init__(self, model: Bert, guesses: Guesses, batch_size: int):
        self.batch_size = min(batch_size, len(guesses[0]))
        seen, positions, targets = guesses
        rest = ((0, -len(seen) % self.batch_size), (0, 0))  # rows without a target, for whole batches: one shape
        self.guesses = np.pad(seen, rest), np.pad(positions, rest), np.pad(targets, rest, constant_values=-1)

        def judge(seen: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
            logits = model.at(seen, positions).contiguous()
            losses = kernels.cross_entropy(logits, targets.maximum(0))
            right = logits.argmax(-1) == targets
            there = targets >= 0
            return Tensor.stack(there.where(losses, 0).sum(), right.float().sum(), there.float().sum()).realize()

        self._judge = capture_at_once(judge)

    def __call__(self) -> MaskedScore:
        total = np.zeros(3)
        for i in range(0, len(self.guesses[0]), self.batch_size):
            total += self._judge(*(Tensor(part[i : i + self.batch_size]).realize() for part in self.guesses)).numpy()
        return MaskedScore(float(total[0] / total[2]), float(total[1] / total[2]))


def counting_baselines(data: np.ndarray, guesses: Guesses, vocab_size: int, k: float = 0.1) -> dict[str, MaskedScore]:
    """What counting in `data` (n,) makes of the same guesses.

    unigram: p(x) = (count(x) + k) / (n + k · vocab_size). bigram: λ count(y, x) / count(y) + (1 − λ) p(x), with y the token that is
    seen to the left, and the λ of 0.1 to 0.9 that does best on these very guesses; where y was never seen, p(x).
    """
    seen, positions, targets = guesses
    there = targets >= 0
    x = targets[there].astype(np.int64)
    y = np.where(positions > 0, np.take_along_axis(seen, np.maximum(positions - 1, 0), 1), -1)[there].astype(np.int64)
    counts = np.bincount(data, minlength=vocab_size)
    unigram = (counts + k) / (len(data) + k * vocab_size)
    pairs, times = np.unique(data[:-1].astype(np.int64) * vocab_size + data[1:], return_counts=True)
    first = pairs // vocab_size

    def times_of(codes: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(pairs, codes), len(pairs) - 1)
        return np.where(pairs[place] == codes, times[place], 0)

    before = np.bincount(first, times, vocab_size)
    known = (y >= 0) & (before[y] > 0)
    share = np.where(known, times_of(y * vocab_size + x) / np.maximum(before[y], 1), 0)
    losses = [float(-np.log(np.where(known, w * share + (1 - w) * unigram[x], unigram[x])).mean()) for w in np.arange(1, 10) / 10]
    order = np.lexsort((times, first))  # the last of each first token is its likeliest successor
    ends = np.append(np.nonzero(np.diff(first[order]))[0], len(order) - 1)
    likeliest = np.full(vocab_size, counts.argmax())
    likeliest[first[order][ends]] = pairs[order][ends] % vocab_size
    return {
        "unigram": MaskedScore(float(-np.log(unigram[x]).mean()), float((x == counts.argmax()).mean())),
        "bigram": MaskedScore(min(losses), float((x == np.where(known, likeliest[y], counts.argmax())).mean())),
    }


class BertTraining:
    """Iterate over it to train a new BERT on `corpus`: Steps, and now and then the score on held-out text. `stop()` ends it early."""

    def __init__(self, settings: BertSettings, corpus: Corpus, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter):
        s = self.settings = settings
        self.tokenizer = train_bpe(corpus.pieces(), s.vocabulary, (PAD, MASK))
        pad, mask = special_ids(self.tokenizer)
        try:
            shape = BertConfig(
                self.tokenizer.vocab_size,
                s.context_length,
                d_model=s.d_model,
                n_layers=s.n_layers,
                n_heads=s.n_heads,
                activation="gelu_new",
                norm=s.norm,
                norm_epsilon=1e-5,
                segments=0,
                pad=pad,
                mask=mask,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        pieces = [encode_corpus(self.tokenizer, piece) for piece in progress(corpus.pieces())]
        self.learned, self.heldout = split(np.concatenate(pieces), s.validation)
        if len(self.learned) < s.context_length:
            raise LamaError(
                f"the text must be longer than context_length; got {len(self.learned)} tokens, context_length={s.context_length}"
            )
        self.model = Bert(shape, s.seed)
        self.guesses = heldout_guesses(self.heldout, shape, s.heldout_windows)
        self.evaluate = MaskedEvaluator(self.model, self.guesses, s.batch_size)
        self.baselines = counting_baselines(self.learned, self.guesses, shape.vocab_size)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def __iter__(self) -> Iterator[Step | MaskedScore]:
        """Raises LamaError if the loss is no longer a number."""
        every = max(1, self.settings.steps // 8)
        for step in Trainer(self.model, masked_windows(self.learned, self.settings, self.model.config), self.settings, masked_loss):
            yield step
            if self.stopped:
                return
            if step.step % every == 0 or step.step == self.settings.steps:
                yield self.evaluate()


def fill_in(model: Bert, tokenizer: MaskTokenizer, text: str, best: int = 5) -> list[list[tuple[str, float]]]:
    """For each [MASK] of the text, the `best` likeliest tokens and their probabilities. Raises LamaError."""
    pad, mask = special_ids(tokenizer)
    ids = masked_input(tokenizer, text)
    places = [i for i, token in enumerate(ids) if token == mask]
    if not places:
        raise LamaError(f"the text must have a {MASK} to fill in; got {text[:60]!r}")
    check_length(check_tokens(tokenizer, ids, model.config.vocab_size), model.config.context_length)
    row = np.full((1, min(model.config.context_length, -(-len(ids) // 16) * 16)), pad, np.int32)  # few lengths: each is compiled
    row[0, : len(ids)] = ids
    chances = model.at(Tensor(row), Tensor(np.array([places], np.int32))).softmax(-1).numpy()[0]
    chances[:, [pad, mask]] = chances[:, tokenizer.vocab_size :] = 0
    order = np.argsort(-chances, axis=-1)[:, :best]
    return [[(tokenizer.decode([int(i)]), float(chance[i])) for i in row] for chance, row in zip(chances, order, strict=True)]
