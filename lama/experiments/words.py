"""Model Shakespeare's complete works in whole words, and compare with counts of words and pairs.

Source: the last exercise of J. Hilton's curriculum, chapter 1.
"""

import functools
import math
import re
from collections import Counter

import numpy as np

from lama.data import evaluation_windows, split_tail
from lama.data.labelled import SHAKESPEARE
from lama.data.packages import archive_texts
from lama.data.windows import epoch_order, take_windows
from lama.experiments.report import Options, Report, Table
from lama.experiments.text import TextFit, loss_panel
from lama.generation import Sampling, generate_tokens
from lama.models.gpt import GPT, GPTConfig
from lama.shapes import Array
from lama.training.loop import Trainer
from lama.training.loss import Evaluator
from lama.training.settings.base import TrainingConfig

T, BATCH, STEPS, EVALUATED = 64, 16, 2000, 512
LEAST = 5  # occurrences of a word in the vocabulary
RARE = "<rare>"
BEGINNINGS = ("To be, or not to ", "Romeo, ", "KING HENRY.\n")


def pieces(text: str) -> list[str]:
    """Split a text into words and the characters between them."""
    return [piece for piece in re.split(r"\b", text) if piece]


@functools.cache
def data() -> tuple[Array, Array, list[str]]:
    """Token ids for training, held-out token ids, and the words; rare words are the first, RARE."""
    texts = archive_texts(SHAKESPEARE, r"shksprdata/texts/(.*)_gut\.txt").values()
    train_words, heldout_words = split_tail(np.array(pieces("\n\n".join(texts)), object))
    words = [RARE, *sorted(word for word, n in Counter(train_words).items() if n >= LEAST)]
    ids = {word: i for i, word in enumerate(words)}
    train, heldout = ([ids.get(word, 0) for word in part] for part in (train_words, heldout_words))
    return np.array(train), np.array(heldout), words


def counted(train: Array, heldout: Array, n: int) -> tuple[float, float]:
    """Held-out losses of word frequencies, and of their best mixture with pair counts, in nats per token."""
    times = np.bincount(train, minlength=n)
    unigram = (times + 0.1) / (len(train) + 0.1 * n)
    pairs, counts = np.unique(train[:-1] * n + train[1:], return_counts=True)
    asked = heldout[:-1] * n + heldout[1:]
    indices = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    bigram = np.where(pairs[indices] == asked, counts[indices], 0) / np.maximum(times[heldout[:-1]], 1)
    alone = unigram[heldout[1:]]
    mixed = [float(-np.log(w * bigram + (1 - w) * alone).mean()) for w in np.arange(1, 10) / 10]
    return float(-np.log(alone).mean()), min(mixed)


def run(options: Options) -> Report:
    train, heldout, words = data()
    steps, n = options.steps or STEPS, len(words)
    # Adjacent windows of T + 1 tokens: no token is in two of them.
    starts = np.arange(len(train) // (T + 1)) * (T + 1)
    config = TrainingConfig(
        steps, BATCH, learning_rate=3e-3, warmup=min(100, steps // 2), dropout=0.1, seed=options.seed
    )
    order = epoch_order(len(starts), BATCH, options.seed)

    def batches(step: int) -> tuple[Array, Array]:
        windows = take_windows(train, starts[order(step)], T + 1)
        return windows[:, :-1], windows[:, 1:]

    model = GPT(GPTConfig(n, T, d_model=96, n_layers=2, n_heads=4, bias=False), options.seed)
    evaluate = Evaluator(model, evaluation_windows(heldout, T, EVALUATED), BATCH)
    before = evaluate()
    losses = [step.loss for step in options.watch(Trainer(model, batches, config), steps, "words")]
    after = evaluate()
    unigram, bigram = counted(train, heldout, n)
    said = [(text.strip(), continuation(model, text, words, options.seed)) for text in BEGINNINGS]
    read = take_windows(np.arange(len(train)), starts, T + 1)
    uniform = abs(before / math.log(n) - 1) < 0.02
    counts = ("words and the characters between them", len(train), len(heldout), n)
    results = ("held-out text", before, unigram, bigram, after)
    return Report(
        [
            Table(("tokens", "for training", "held out", "different"), [counts]),
            Table(("nats per token", "untrained", "unigram", "bigram", "trained"), [results]),
            Table(("beginning", "continuation"), said),
        ],
        [loss_panel({"transformer": TextFit(losses, after)}, unit="nats per word")],
        {
            "no two windows of the training share a token of the text": len(np.unique(read)) == read.size,
            "untrained, it predicts all words equally: the loss is ln of their number, within 2 %": uniform,
            "trained, it is better than counting words and pairs of them": after < min(unigram, bigram),
        },
    )


def continuation(model: GPT, text: str, words: list[str], seed: int) -> str:
    """The model's continuation of `text`, on one line."""
    prompt = [words.index(piece) for piece in pieces(text)]
    found = generate_tokens(model, [prompt], 24, Sampling(temperature=0.7), seed)
    return " ".join("".join(words[token] for (token,) in found if token is not None).split())
