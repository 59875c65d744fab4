"""Training BERT to predict masked tokens, evaluated on held-out text and compared with n-gram counts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from lama import ops
from lama.data import TokenFiles, open_corpus, open_tokens
from lama.data.masked import MASK, PAD, mask_tokens, special_ids
from lama.data.windows import evenly_spaced, take_windows
from lama.dropout import Dropout, no_dropout
from lama.errors import LamaError, UsageError
from lama.models.bert import Bert, BertConfig
from lama.runtime.capture import CapturedStep
from lama.shapes import Array
from lama.tokenizers import BytePairTokenizer, train_bpe
from lama.training.corpus import CorpusSession, new_tokens
from lama.training.loop import Batches, Trainer
from lama.training.session import Parts
from lama.training.settings import BertSettings, ClassifierSettings
from lama.training.settings.base import TrainingConfig

MaskedWindows = tuple[Array, Array, Array]  # as returned by `mask_tokens`


def masked_windows(data: Array, config: TrainingConfig, model: BertConfig) -> Batches:
    """Random masked windows of `data`, token ids (n,): a function of seed and step."""

    def batches(step: int) -> MaskedWindows:
        rng = np.random.default_rng((config.seed, step))
        starts = rng.integers(len(data) - model.context_length + 1, size=config.batch_size)
        windows = take_windows(data, starts, model.context_length)
        return mask_tokens(windows, rng, model.mask, model.vocab_size, (model.pad,))

    return batches


def heldout_masked(data: Array, model: BertConfig, limit: int) -> MaskedWindows:
    """Up to `limit` evenly spaced masked windows of `data`, always the same. Raises LamaError."""
    T = model.context_length
    if len(data) < T:
        found = f"{len(data)} tokens, context_length={T}"
        raise LamaError(f"the held-out text must be as long as context_length; got {found}")
    starts = evenly_spaced(len(data) // T, min(len(data) // T, limit)) * T
    windows, rng = take_windows(data, starts, T), np.random.default_rng(0)
    return mask_tokens(windows, rng, model.mask, model.vocab_size, (model.pad,))


def masked_loss(
    model: Bert,
    seen: Tensor,
    positions: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    dropout: Dropout = no_dropout,
) -> Tensor:
    """The mean cross-entropy of the masked tokens, in nats; targets of -1 are ignored."""
    logits = model.at(seen, positions, dropout=dropout)  # (B, n, vocab_size)
    losses = ops.cross_entropy(logits, targets.maximum(0), smoothing)
    there = targets >= 0
    return there.where(losses, 0).sum() / there.sum().maximum(1)


@dataclass(frozen=True)
class MaskedScore:
    """Loss and accuracy on masked tokens."""

    loss: float
    """Nats per masked token."""
    accuracy: float
    """The share of masked tokens for which the right token has the highest score."""


class MaskedEvaluator:
    """The score on fixed masked windows while a model trains; compiled once."""

    def __init__(self, model: Bert, windows: MaskedWindows, batch_size: int):
        self.batch_size = min(batch_size, len(windows[0]))
        seen, positions, targets = windows
        # Rows without targets pad the last batch, so that all batches have one shape.
        rest = ((0, -len(seen) % self.batch_size), (0, 0))
        self.windows = np.pad(seen, rest), np.pad(positions, rest), np.pad(targets, rest, constant_values=-1)

        def score(seen: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
            logits = model.at(seen, positions).contiguous()
            losses = ops.cross_entropy(logits, targets.maximum(0))
            right, there = logits.argmax(-1) == targets, targets >= 0
            sums = (there.where(losses, 0).sum(), right.float().sum(), there.float().sum())
            return Tensor.stack(*sums).realize()

        self._score = CapturedStep(score)

    def __call__(self) -> MaskedScore:
        total = np.zeros(3)
        for i in range(0, len(self.windows[0]), self.batch_size):
            batch = [Tensor(part[i : i + self.batch_size]).realize() for part in self.windows]
            total += self._score(*batch).numpy()
        return MaskedScore(float(total[0] / total[2]), float(total[1] / total[2]))


def counting_baselines(data: Array, windows: MaskedWindows, vocab_size: int) -> dict[str, MaskedScore]:
    """The scores of n-grams counted in `data` (n,) on the same masked windows.

    unigram: p(x) = (count(x) + 0.1) / (n + 0.1 · vocab_size). bigram: λ count(y, x) / count(y) + (1 − λ)
    p(x), with y the token to the left and the best λ of 0.1, 0.2, ... 0.9; p(x) if y is unknown.
    """
    seen, positions, targets = windows
    there = targets >= 0
    x = targets[there].astype(np.int64)
    left = np.take_along_axis(seen, np.maximum(positions - 1, 0), 1)
    y = np.where(positions > 0, left, -1)[there].astype(np.int64)
    counts = np.bincount(data, minlength=vocab_size)
    unigram = (counts + 0.1) / (len(data) + 0.1 * vocab_size)
    pairs, times = np.unique(data[:-1].astype(np.int64) * vocab_size + data[1:], return_counts=True)
    first, second = np.divmod(pairs, vocab_size)
    before = np.bincount(first, times, vocab_size)
    known = (y >= 0) & (before[y] > 0)
    wanted = y * vocab_size + x
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    together = np.where(pairs[place] == wanted, times[place], 0)
    share = together / np.maximum(before[y], 1)
    mixtures = (np.where(known, w * share + (1 - w) * unigram[x], unigram[x]) for w in np.arange(1, 10) / 10)
    loss = min(float(-np.log(mixture).mean()) for mixture in mixtures)
    order = np.lexsort((times, first))  # the last of each first token is its likeliest successor
    ends = order[np.append(np.diff(first[order]) > 0, True)]
    commonest = counts.argmax()
    likeliest = np.full(vocab_size, commonest)
    likeliest[first[ends]] = second[ends]
    predicted = np.where(known, likeliest[y], commonest)
    return {
        "unigram": MaskedScore(float(-np.log(unigram[x]).mean()), float((x == commonest).mean())),
        "bigram": MaskedScore(loss, float((x == predicted).mean())),
    }


class BertSession(CorpusSession):
    """The training of a BERT on a corpus."""

    config: BertSettings
    model: Bert
    tokenizer: BytePairTokenizer

    def __init__(self, parts: Parts, tokens: TokenFiles):
        super().__init__(parts, tokens)
        config, model = self.config, self.model
        batches = masked_windows(tokens.train, config, model.config)
        self.trainers.append(Trainer(model, batches, config, masked_loss, self.devices, self.team))
        self.windows = heldout_masked(tokens.validation, model.config, config.heldout_windows)
        self.evaluator = MaskedEvaluator(model, self.windows, config.batch_size)

    @property
    def plan(self) -> str:
        return f"{super().plan}, 15 % of them to be predicted"

    def measure(self) -> dict[str, float]:
        score = self.evaluator()
        return {"validation_loss": score.loss, "accuracy": score.accuracy}

    def best_notes(self, metrics: Mapping[str, float]) -> dict[str, object]:
        losses = {"untrained": self.untrained, **self.baselines, "trained": metrics["validation_loss"]}
        shares = self.shares | {"trained": metrics["accuracy"]}
        scores = {name: {"nats_per_token": loss, "accuracy": shares[name]} for name, loss in losses.items()}
        return {"heldout": scores}

    def measure_baselines(self) -> None:
        scores = counting_baselines(self.tokens.train, self.windows, self.model.config.vocab_size)
        self.baselines = {name: score.loss for name, score in scores.items()}
        self.shares = {name: score.accuracy for name, score in scores.items()}


def encoder_shape(
    config: BertSettings | ClassifierSettings, tokenizer: BytePairTokenizer, length: int
) -> BertConfig:
    """The config of the encoder that the settings describe. Raises UsageError."""
    pad, mask = special_ids(tokenizer)
    try:
        return BertConfig(
            tokenizer.vocab_size,
            length,
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            d_mlp=config.d_mlp,
            activation="gelu_new",
            norm=config.norm,
            norm_epsilon=1e-5,
            segments=0,
            pad=pad,
            mask=mask,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def new_bert(parts: Parts) -> BertSession:
    """Prepare a training on a corpus. Raises LamaError; the folder is then unchanged."""
    folder, config = parts.folder, parts.config
    corpus = open_corpus(config.corpus, without=folder.path)
    parts.tokenizer = train_bpe(corpus.pieces(), config.vocabulary, (PAD, MASK))
    shape = encoder_shape(config, parts.tokenizer, config.context_length)
    with folder.beginning(config, str(parts.about["command"])) as data:
        new_tokens(parts, corpus, data)
    tokens = open_tokens(folder.data)
    parts.about = {**parts.about, **tokens.corpus, "corpus": corpus.name, "seed": config.seed}
    parts.model = Bert(shape, config.seed)
    return BertSession(parts, tokens)
