"""Training a classifier on labelled texts: its tokens, its settings, its batches, and its judgement."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama import kernels
from lama.data.inputs import classifier_input
from lama.data.labelled import Example, split_labelled
from lama.data.masked import MASK, PAD, mask_tokens
from lama.data.windows import shuffled
from lama.dropout import Dropout, no_dropout
from lama.errors import UsageError
from lama.jit import capture_at_once
from lama.models.bert import Bert, BertConfig, Classifier, ClassifierConfig
from lama.tokenizers import BytePairTokenizer, train_bpe
from lama.training.encoders import ClassifierSettings
from lama.training.loop import Step, Trainer
from lama.training.masked import masked_loss, special_ids

JUDGED_AT_ONCE = 128  # rows


def make_classifier(settings: ClassifierSettings, texts: Sequence[str], labels: tuple[str, ...]) -> tuple[Classifier, BytePairTokenizer]:
    """A tokenizer trained on these texts, and an untrained model for it. Raises UsageError for a shape that cannot be."""
    spaced = [f" {text}\n" for text in texts]
    tokenizer = train_bpe(spaced, settings.vocabulary, (PAD, MASK), at_most=True)
    pad, mask = special_ids(tokenizer)
    length = settings.context_length or _length([len(classifier_input(tokenizer, text)) for text in texts])
    try:
        config = ClassifierConfig(
            tokenizer.vocab_size,
            length,
            d_model=settings.d_model,
            n_layers=settings.n_layers,
            n_heads=settings.n_heads,
            activation="gelu_new",
            norm="pre",
            norm_epsilon=1e-5,
            segments=0,
            pad=pad,
            mask=mask,
            labels=labels,
            pooling=settings.pooling,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Classifier(config, settings.seed), tokenizer


def _length(lengths: Sequence[int]) -> int:
    """What 99 of 100 texts need, a multiple of 8 of at most 256."""
    return int(min(256, -(-max(1, np.quantile(lengths, 0.99)) // 8) * 8))


def rows_of(tokenizer: BytePairTokenizer, texts: Sequence[str], config: BertConfig) -> np.ndarray:
    """(texts, context_length) int32, cut or padded."""
    rows = np.full((len(texts), config.context_length), config.pad, np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = classifier_input(tokenizer, text)[: config.context_length]
        row[: len(ids)] = ids
    return rows


def class_loss(model: Classifier, rows: Tensor, labels: Tensor, smoothing: float = 0.0, dropout: Dropout = no_dropout) -> Tensor:
    """The mean cross-entropy of the classes: rows (B, T), labels (B,)."""
    return kernels.cross_entropy(model(rows, dropout=dropout), labels, smoothing).mean()


class Predictor:
    """The classes' probabilities for texts, `batch_size` at a time, compiled once."""

    def __init__(self, model: Classifier, tokenizer: BytePairTokenizer, batch_size: int = JUDGED_AT_ONCE):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._logits = capture_at_once(lambda rows: model(rows).realize())

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, labels), rows that sum to 1."""
        return self.of_rows(rows_of(self.tokenizer, texts, self.model.config))

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        config, n = self.model.config, self.batch_size
        found = []
        for i in range(0, len(rows), n):
            part = np.full((n, config.context_length), config.pad, np.int32)
            part[: len(rows[i : i + n])] = rows[i : i + n]
            found.append(self._logits(Tensor(part).realize()).numpy().copy()[: len(rows[i : i + n])])
        logits = np.concatenate(found) if found else np.zeros((0, len(config.labels)), np.float32)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True))


@dataclass(frozen=True)
class Judgement:
    """How the texts of each class were classified."""

    labels: tuple[str, ...]
    confusion: np.ndarray
    """(labels, labels) counts: row, what it is; column, what it was taken for."""

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())

    def table(self) -> str:
        """The counts, and for each class how many of its texts were found (recall) and of those found were right (precision)."""
        width = max(8, *(len(label) for label in self.labels)) + 2
        lines = ["".join(f"{cell:>{width}}" for cell in ("is \\ found", *self.labels, "recall"))]
        for i, label in enumerate(self.labels):
            cells = (label, *(f"{n:,}" for n in self.confusion[i]), share(self.confusion[i], i))
            lines.append("".join(f"{cell:>{width}}" for cell in cells))
        precision = (share(self.confusion[:, i], i) for i in range(len(self.labels)))
        lines.append("".join(f"{cell:>{width}}" for cell in ("precision", *precision)))
        return "\n".join(lines)


def share(counts: np.ndarray, i: int) -> str:
    """How much of all counts are those of class i."""
    return f"{counts[i] / counts.sum():.1%}" if counts.sum() else "-"


def judge(labels: tuple[str, ...], examples: Sequence[Example], found: Sequence[str]) -> Judgement:
    """What was `found` for the texts of `examples`, beside what they are."""
    number = {label: i for i, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, ([number[e.label] for e in examples], [number[label] for label in found]), 1)
    return Judgement(labels, confusion)


def judged(predictor: Predictor, examples: Sequence[Example]) -> Judgement:
    labels = predictor.model.config.labels
    return judge(labels, examples, [labels[i] for i in predictor([e.text for e in examples]).argmax(-1)])


@dataclass(frozen=True)
class Check:
    """How the model does on the tenth of its training texts that it does not learn from."""

    step: int
    accuracy: float
    best: bool


class ClassifierTraining:
    """Iterate over it to train a new classifier on `examples`: Steps of the pretraining, then Steps and Checks of the training.

    A tenth of the examples is kept back to tell which weights are best; at the end `model` has those. `stop()` ends it early.
    """

    def __init__(self, settings: ClassifierSettings, examples: Sequence[Example], labels: tuple[str, ...]):
        self.settings = settings
        learned, checked = split_labelled(examples, 0.1, seed=1)
        self.model, self.tokenizer = make_classifier(settings, [e.text for e in learned], labels)
        config = self.model.config
        self.rows = rows_of(self.tokenizer, [e.text for e in learned], config)
        self.places = shuffled(len(self.rows), settings.batch_size, settings.seed)
        self.labels = np.array([labels.index(e.label) for e in learned], np.int32)
        self.checked = rows_of(self.tokenizer, [e.text for e in checked], config)
        self.right = np.array([labels.index(e.label) for e in checked])
        self.predictor = Predictor(self.model, self.tokenizer)
        self.best, self.stopped, self.pretraining = 0.0, False, settings.pretraining > 0
        self._best_weights: dict[str, np.ndarray] = {}

    def stop(self) -> None:
        self.stopped = True

    def __iter__(self) -> Iterator[Step | Check]:
        """Raises LamaError if the loss is no longer a number."""
        if self.settings.pretraining:
            yield from self._pretrain()
        if self.stopped:
            return
        self.pretraining = False
        every = max(1, self.settings.steps // 10)
        for step in Trainer(self.model, self._batch, self.settings, class_loss):
            yield step
            if self.stopped:
                break
            if step.step % every == 0 or step.step == self.settings.steps:
                yield self._check(step.step)
        for name, p in get_state_dict(self.model).items():
            if name in self._best_weights:
                p.assign(Tensor(self._best_weights[name])).realize()

    def _pretrain(self) -> Iterator[Step]:
        s, config = self.settings, self.model.config
        bert = Bert(bert_config(config), s.seed)
        bert.encoder = self.model.encoder

        def batches(step: int) -> tuple[np.ndarray, ...]:
            rng = np.random.default_rng((s.seed, step, 1))
            return mask_tokens(self.rows[self.places(step)], rng, config.mask, config.vocab_size, (config.pad,))

        changes: dict[str, Any] = {"steps": s.pretraining, "learning_rate": s.pretraining_rate, "min_learning_rate": -1.0}
        changes |= {"warmup": min(200, s.pretraining // 10), "dropout": min(s.dropout, 0.1), "label_smoothing": 0.0}
        for step in Trainer(bert, batches, dataclasses.replace(s, **changes), masked_loss):
            yield step
            if self.stopped:
                return

    def _batch(self, step: int) -> tuple[np.ndarray, ...]:
        s, config = self.settings, self.model.config
        places = self.places(step)
        rows = self.rows[places]
        hidden = np.random.default_rng((s.seed, step, 2)).random(rows.shape) < s.word_dropout
        return np.where(hidden & (rows != config.pad), config.mask, rows).astype(np.int32), self.labels[places]

    def _check(self, step: int) -> Check:
        accuracy = float((self.predictor.of_rows(self.checked).argmax(-1) == self.right).mean())
        best = accuracy > self.best
        if best:
            self.best = accuracy
            self._best_weights = {name: p.numpy().copy() for name, p in get_state_dict(self.model).items()}
        return Check(step, accuracy, best)


def bert_config(config: ClassifierConfig) -> BertConfig:
    """The same encoder without classes."""
    return BertConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(BertConfig)})
