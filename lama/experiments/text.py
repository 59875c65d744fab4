"""The small language model of the experiments: characters of the King James Bible."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from tinygrad import Tensor

from lama.data import default_corpus, encode_corpus, evaluation_windows, split_tail
from lama.experiments.report import Curve, Options, Panel
from lama.models.gpt import GPTConfig
from lama.shapes import Array
from lama.tokenizers import CharacterTokenizer
from lama.training.loop import Trainer, language_model_batches
from lama.training.loss import Evaluator
from lama.training.settings.base import TrainingConfig

CHARACTERS = 400_000
EVALUATED = 256  # held-out windows
STEPS, BATCH = 1500, 16


@functools.cache
def data() -> tuple[Array, Array, int]:
    """Token ids for training, held-out token ids, and the number of characters."""
    text = default_corpus().text[:CHARACTERS]
    tokenizer = CharacterTokenizer("".join(sorted(set(text))))
    return *split_tail(encode_corpus(tokenizer, text)), tokenizer.vocab_size


def shape(
    n_layers: int = 2,
    context_length: int = 32,
    norm: str = "pre",
    positions: str = "learned",
    similarity: str = "scaled_dot",
    residual: bool = True,
    tied: bool = True,
) -> GPTConfig:
    """The model's config."""
    return GPTConfig(
        vocab_size=data()[2],
        context_length=context_length,
        d_model=48,
        n_layers=n_layers,
        n_heads=4,
        bias=False,
        tied=tied,
        norm=norm,
        positions=positions,
        similarity=similarity,
        residual=residual,
    )


@runtime_checkable
class TextModel(Protocol):
    """A model of tokens (B, T) -> logits (B, T, vocab_size)."""

    @property
    def config(self) -> GPTConfig: ...

    def __call__(self, tokens: Tensor) -> Tensor: ...


M = TypeVar("M", bound=TextModel)
M_co = TypeVar("M_co", bound=TextModel, covariant=True)


@dataclass(frozen=True)
class TextFit(Generic[M_co]):
    """A trained model, its training losses by step, and its held-out loss, in nats per character."""

    model: M_co
    losses: list[float]
    heldout: float


def fit(options: Options, label: str, model: M, rate: float = 3e-3, warmup: int = 40) -> TextFit[M]:
    """Train a model on windows of its context length."""
    train, _, _ = data()
    steps = options.steps or STEPS
    config = TrainingConfig(
        steps, BATCH, learning_rate=rate, warmup=min(warmup, steps // 2), seed=options.seed
    )
    trainer = Trainer(model, language_model_batches(train, config, model.config.context_length), config)
    losses = [step.loss for step in options.watch(trainer, steps, label)]
    return TextFit(model, losses, heldout(model))


def heldout(model: TextModel) -> float:
    """The mean loss on held-out windows of the model's context length."""
    return Evaluator(model, evaluation_windows(data()[1], model.config.context_length, EVALUATED), 32)()


def frequencies() -> float:
    """The held-out loss of character frequencies alone."""
    train, _, vocab_size = data()
    counts = np.bincount(train, minlength=vocab_size) + 0.1
    _, targets = evaluation_windows(data()[1], shape().context_length, EVALUATED)
    return float(-np.log(counts / counts.sum())[targets].mean())


def batch(n: int) -> tuple[Tensor, Tensor]:
    """`n` held-out windows: inputs and targets."""
    inputs, targets = evaluation_windows(data()[1], shape().context_length, n)
    return Tensor(inputs).realize(), Tensor(targets).realize()


def smooth(losses: list[float], reach: int = 10) -> list[float]:
    """Moving average, for curves."""
    return [float(np.mean(losses[max(0, i - reach) : i + reach + 1])) for i in range(len(losses))]


def loss_panel(fits: Mapping[str, TextFit[TextModel]], title: str = "training loss") -> Panel:
    """Training losses of several models."""
    curves = [Curve(name, range(len(found.losses)), smooth(found.losses)) for name, found in fits.items()]
    return Panel(title, "step", "nats per character", curves)
