"""The small language model that the experiments vary: characters of the King James Bible."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.data import default_corpus, encode_corpus, evaluation_windows, split
from lama.experiments.report import Options
from lama.models.gpt import GPTConfig
from lama.tokenizers import CharacterTokenizer
from lama.training.config import TrainingConfig
from lama.training.loop import Trainer, windows
from lama.training.loss import Evaluator

CHARACTERS = 400_000
JUDGED = 256  # windows of held-out text
STEPS, BATCH = 1500, 16


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids to train on, to judge by, and how many characters there are."""
    text = default_corpus().text[:CHARACTERS]
    tokenizer = CharacterTokenizer("".join(sorted(set(text))))
    return *split(encode_corpus(tokenizer, text)), tokenizer.vocab_size


def shape(**changes: object) -> GPTConfig:
    """The model, but for `changes`."""
    return replace(GPTConfig(data()[2], context_length=32, d_model=48, n_layers=2, n_heads=4, bias=False), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Fit:
    """A trained model, its training losses step by step, and its loss on held-out text; nats per character."""

    model: Any
    losses: list[float]
    heldout: float


def fit(options: Options, label: str, model: Any, rate: float = 3e-3, warmup: int = 40) -> Fit:
    """Train a GPT, or what is called like one, on windows as long as its context."""
    train, _, _ = data()
    steps = options.steps or STEPS
    config = TrainingConfig(steps, BATCH, learning_rate=rate, warmup=min(warmup, steps // 2), seed=options.seed)
    trainer = Trainer(model, windows(train, config, model.config.context_length), config)
    losses = [step.loss for step in options.watch(trainer, steps, label)]
    return Fit(model, losses, heldout(model))


def heldout(model: Any, context_length: int | None = None) -> float:
    """The mean loss on held-out text, in windows of the model's context or another length."""
    return Evaluator(model, evaluation_windows(data()[1], context_length or model.config.context_length, JUDGED), 32)()


def frequencies() -> float:
    """The held-out loss of what knows no more than how frequent each character is."""
    train, _, vocab_size = data()
    counts = np.bincount(train, minlength=vocab_size) + 0.1
    _, targets = evaluation_windows(data()[1], shape().context_length, JUDGED)
    return float(-np.log(counts / counts.sum())[targets].mean())


def batch(n: int) -> tuple[Tensor, Tensor]:
    """`n` windows of held-out text: inputs and targets."""
    inputs, targets = evaluation_windows(data()[1], shape().context_length, n)
    return Tensor(inputs).realize(), Tensor(targets).realize()


def smooth(losses: list[float], reach: int = 10) -> list[float]:
    """Means of neighbours, for curves."""
    return [float(np.mean(losses[max(0, i - reach) : i + reach + 1])) for i in range(len(losses))]
