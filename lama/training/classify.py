"""Training a classifier on labelled texts, and its evaluation."""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from lama import ops
from lama.data.inputs import classifier_input
from lama.data.labelled import LabelledText, open_labelled, split_labelled
from lama.data.masked import MASK, PAD, mask_tokens
from lama.data.naive_bayes import NaiveBayes, best_naive_bayes
from lama.data.pairs import padded
from lama.data.windows import epoch_order
from lama.dropout import Dropout, no_dropout
from lama.errors import LamaError, quoted
from lama.models.bert import Bert, BertConfig, Classifier, ClassifierConfig
from lama.runtime.capture import CapturedStep
from lama.shapes import Array
from lama.tokenizers import BytePairTokenizer, train_bpe
from lama.training.loop import Trainer
from lama.training.masked import encoder_shape, masked_loss
from lama.training.rows import Rows, write_rows
from lama.training.session import Parts, Session
from lama.training.settings.classifier import ClassifierSettings

BATCH = 128  # texts of an evaluation
LONGEST = 256  # the most tokens of a text that are read, by default


def make_classifier(
    settings: ClassifierSettings, texts: Sequence[str], labels: tuple[str, ...]
) -> tuple[Classifier, BytePairTokenizer]:
    """A tokenizer trained on these texts, and an untrained model. Raises UsageError for an invalid shape."""
    spaced = [f" {text}\n" for text in texts]
    tokenizer = train_bpe(spaced, settings.vocabulary, (PAD, MASK), at_most=True)
    if not (length := settings.context_length):
        lengths = [len(classifier_input(tokenizer, text)) for text in texts]
        # The length of 99 in 100 texts, rounded up to a multiple of 8.
        length = int(min(LONGEST, -(-max(1, np.quantile(lengths, 0.99)) // 8) * 8))
    shape = encoder_shape(settings, tokenizer, length)
    config = ClassifierConfig(**dataclasses.asdict(shape), labels=labels, pooling=settings.pooling)
    return Classifier(config, settings.seed), tokenizer


def rows_of(tokenizer: BytePairTokenizer, texts: Sequence[str], config: BertConfig) -> Array:
    """The texts' token ids, cut or padded: (texts, context_length) int32."""
    length = config.context_length
    return padded([classifier_input(tokenizer, text)[:length] for text in texts], length, config.pad)


def class_loss(
    model: Classifier, rows: Tensor, labels: Tensor, smoothing: float = 0.0, dropout: Dropout = no_dropout
) -> Tensor:
    """The mean cross-entropy of the classes, for rows (B, T) and labels (B,)."""
    return ops.cross_entropy(model(rows, dropout=dropout), labels, smoothing).mean()


class Predictor:
    """Predicts the classes' probabilities for texts, `batch_size` at a time; compiled once."""

    def __init__(self, model: Classifier, tokenizer: BytePairTokenizer, batch_size: int = BATCH):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._logits = CapturedStep(lambda rows: model(rows).realize())

    def __call__(self, texts: Sequence[str]) -> Array:
        """The probabilities of the classes: (texts, labels)."""
        return self.of_rows(rows_of(self.tokenizer, texts, self.model.config))

    def of_rows(self, rows: Array) -> Array:
        """The same for the token ids that `rows_of` returns."""
        config, n = self.model.config, self.batch_size
        logits = np.empty((len(rows), len(config.labels)), np.float32)
        for i in range(0, len(rows), n):
            some, part = rows[i : i + n], np.full((n, config.context_length), config.pad, np.int32)
            part[: len(some)] = some
            logits[i : i + n] = self._logits(Tensor(part).realize()).numpy()[: len(some)]
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True))


@dataclass(frozen=True)
class Confusion:
    """The result of classifying labelled texts."""

    labels: tuple[str, ...]
    confusion: Array
    """Counts (labels, labels): rows are the true classes, columns the predicted ones."""

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())

    def table(self) -> str:
        """The counts with each class's recall and precision."""

        def share(counts: Array, i: int) -> str:
            return f"{counts[i] / counts.sum():.1%}" if counts.sum() else "-"

        width = max(8, *map(len, self.labels)) + 2
        first = max(18, width)
        rows = [("true \\ predicted", *self.labels, "recall")]
        for i, (label, counts) in enumerate(zip(self.labels, self.confusion, strict=True)):
            rows.append((label, *(f"{n:,}" for n in counts), share(counts, i)))
        rows.append(("precision", *(share(counts, i) for i, counts in enumerate(self.confusion.T))))
        return "\n".join(f"{name:>{first}}" + "".join(f"{n:>{width}}" for n in row) for name, *row in rows)


def confusion_of(
    labels: tuple[str, ...], examples: Sequence[LabelledText], found: Sequence[str]
) -> Confusion:
    """The confusion matrix of the examples' classes and the predicted ones, `found`."""
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    for example, label in zip(examples, found, strict=True):
        confusion[labels.index(example.label), labels.index(label)] += 1
    return Confusion(labels, confusion)


def evaluate(predictor: Predictor, examples: Sequence[LabelledText]) -> Confusion:
    labels = predictor.model.config.labels
    return confusion_of(labels, examples, [labels[i] for i in predictor(texts_of(examples)).argmax(-1)])


class ClassifierSession(Session):
    """The training of a classifier, after a pretraining of its encoder on masked tokens of the same texts.

    A tenth of the training texts is used only for validation, to choose the best model.
    """

    config: ClassifierSettings
    model: Classifier
    tokenizer: BytePairTokenizer
    bayes: NaiveBayes | None = None

    def __init__(self, parts: Parts, rows: Rows):
        super().__init__(parts, rows.digest)
        config, model, tokenizer, shape = self.config, self.model, self.tokenizer, self.model.config

        def arrays(examples: Sequence[LabelledText]) -> tuple[Array, Array]:
            labels = np.array([shape.labels.index(example.label) for example in examples], np.int32)
            return rows_of(tokenizer, texts_of(examples), shape), labels

        self.train = [LabelledText(*row) for row in rows.train]
        self.test = [LabelledText(*row) for row in rows.held_out]
        learned, checked = split_labelled(self.train, 0.1, seed=1)
        self.rows, self.labels = arrays(learned)
        self.checked, self.right = arrays(checked)
        self.order = epoch_order(len(self.rows), config.batch_size, config.seed)
        if steps := config.pretraining:
            same = {field.name: getattr(shape, field.name) for field in dataclasses.fields(BertConfig)}
            bert = Bert(BertConfig(**same), config.seed)
            bert.encoder = model.encoder
            first = dataclasses.replace(
                config,
                steps=steps,
                learning_rate=config.pretraining_rate,
                min_learning_rate=-1.0,
                warmup=min(200, steps // 10),
                dropout=min(config.dropout, 0.1),
                label_smoothing=0.0,
            )
            trainer = Trainer(bert, self._masked_batch, first, masked_loss, self.devices, self.team)
            self.trainers.append(trainer)
        self.trainers.append(Trainer(model, self._batch, config, class_loss, self.devices, self.team))
        self.predictor = Predictor(model, tokenizer)

    @property
    def plan(self) -> str:
        c = self.config
        return f"{c.pretraining} steps of masked-token prediction, {c.steps} of classification"

    def _masked_batch(self, step: int) -> tuple[Array, ...]:
        shape, rng = self.model.config, np.random.default_rng((self.config.seed, step, 1))
        return mask_tokens(self.rows[self.order(step)], rng, shape.mask, shape.vocab_size, (shape.pad,))

    def _batch(self, step: int) -> tuple[Array, ...]:
        shape, places = self.model.config, self.order(step)
        rows, rng = self.rows[places], np.random.default_rng((self.config.seed, step, 2))
        hidden = (rng.random(rows.shape) < self.config.word_dropout) & (rows != shape.pad)
        return np.where(hidden, shape.mask, rows).astype(np.int32), self.labels[places]

    def own_state(self) -> dict[str, Tensor]:
        if self.trainer is self.trainers[-1]:
            return {}
        parameters = self.trainer.parameters.items()  # the pretraining's own head
        return {f"bert.{name}": p for name, p in parameters if not name.startswith("encoder.")}

    def measure(self) -> dict[str, float]:
        chances = self.predictor.of_rows(self.checked)
        loss = -np.log(np.maximum(chances[np.arange(len(chances)), self.right], 1e-30)).mean()
        return {"validation_loss": float(loss), "accuracy": float((chances.argmax(-1) == self.right).mean())}

    def rank(self, metrics: Mapping[str, float]) -> float:
        return 1 - metrics["accuracy"]

    @property
    def result(self) -> str:
        return f"validation accuracy {1 - self.best:.1%}"

    def measure_baselines(self) -> None:
        labels, texts = self.model.config.labels, texts_of(self.test)
        self.bayes = best_naive_bayes(self.train)
        counts = Counter(example.label for example in self.train)
        majority = max(sorted(counts), key=counts.__getitem__)
        found = {"majority": [majority] * len(texts), "naive Bayes": self.bayes(texts)}
        self.shares = {"untrained": evaluate(self.predictor, self.test).accuracy}
        self.shares |= {name: confusion_of(labels, self.test, each).accuracy for name, each in found.items()}


def texts_of(examples: Sequence[LabelledText]) -> list[str]:
    return [example.text for example in examples]


def new_classifier(parts: Parts) -> ClassifierSession:
    """Prepare a training on labelled texts. Raises LamaError; the folder is then unchanged."""
    config = parts.config
    data = open_labelled(config.data)
    train, test = split_labelled(data.examples)
    if missing := set(data.labels) - {example.label for example in train}:
        got = f"got none for {quoted(', '.join(sorted(missing)), plain=True)}. Give more examples"
        raise LamaError(f"the training texts must have an example of each label; {got}")
    learned, _ = split_labelled(train, 0.1, seed=1)
    parts.model, parts.tokenizer = make_classifier(config, texts_of(learned), data.labels)
    with parts.folder.beginning(config, str(parts.about["command"])) as place:
        rows = write_rows(place, train, test)
    is_file = data.provenance == config.data
    parts.about = {
        "data": os.path.abspath(config.data) if is_file else config.data,  # valid from any current folder
        "provenance": data.provenance,
        "licence": data.licence,
        "seed": config.seed,
        **parts.about,
    }
    return ClassifierSession(parts, rows)
