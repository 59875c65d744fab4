"""The small language model of the experiments: characters of the King James Bible."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lama.data import default_corpus, encode_corpus, evaluation_windows, split_tail
from lama.experiments.report import Curve, Options, Panel
from lama.models.gpt import GPTConfig
from lama.shapes import Array
from lama.tokenizers import CharacterTokenizer
from lama.training.loop import Trainer, language_model_batches
from lama.training.loss import Evaluator
from lama.training.settings.base import TrainingConfig

CHARACTERS, CONTEXT = 400_000, 32
EVALUATED = 256  # held-out windows
STEPS, BATCH = 1500, 16


@functools.cache
def data() -> tuple[Array, Array, int]:
    """Token ids for training, held-out token ids, and the number of characters."""
    text = default_corpus().text[:CHARACTERS]
    tokenizer = CharacterTokenizer("".join(sorted(set(text))))
    return *split_tail(encode_corpus(tokenizer, text)), tokenizer.vocab_size


def shape() -> GPTConfig:
    """The config of the models; each experiment changes a part of it."""
    return GPTConfig(data()[2], CONTEXT, d_model=48, n_layers=2, n_heads=4, bias=False)


@dataclass(frozen=True)
class TextFit:
    """A model's training losses by step and its held-out loss, in nats per character."""

    losses: list[float]
    heldout: float


def fit(options: Options, label: str, model: object, warmup: int = 40) -> TextFit:
    """Train a model (B, T) -> (B, T, vocab_size) on windows of CONTEXT characters."""
    steps = options.steps or STEPS
    warmup = min(warmup, steps // 2)
    config = TrainingConfig(steps, BATCH, learning_rate=3e-3, warmup=warmup, seed=options.seed)
    trainer = Trainer(model, language_model_batches(data()[0], config, CONTEXT), config)
    losses = [step.loss for step in options.watch(trainer, steps, label)]
    return TextFit(losses, heldout(model))


def heldout(model: object, length: int = CONTEXT) -> float:
    """The mean loss on held-out windows."""
    return Evaluator(model, windows(length), 32)()


def windows(length: int = CONTEXT, n: int = EVALUATED) -> tuple[Array, ...]:
    """Held-out windows: inputs and targets, (n, length) each."""
    return evaluation_windows(data()[1], length, n)


def frequencies() -> float:
    """The held-out loss of character frequencies alone."""
    train, _, vocab_size = data()
    counts = np.bincount(train, minlength=vocab_size) + 0.1
    return float(-np.log(counts / counts.sum())[windows()[1]].mean())


def smooth(losses: list[float]) -> list[float]:
    """Smooth a curve: the mean of each loss, the ten before it and the ten after it."""
    return [float(np.mean(losses[max(0, i - 10) : i + 11])) for i in range(len(losses))]


def loss_panel(
    fits: Mapping[str, TextFit], title: str = "training loss", unit: str = "nats per character"
) -> Panel:
    """Training losses of several models."""
    curves = [Curve(name, range(len(found.losses)), smooth(found.losses)) for name, found in fits.items()]
    return Panel(title, "step", unit, curves)
