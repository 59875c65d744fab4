"""Four ways to score a query and a key: what each can find, and what it does for a language model. Source: Luong et al. 2015."""

import numpy as np
from tinygrad import Tensor

from lama.attention import SIMILARITIES, MultiHeadAttention
from lama.dropout import Dropout, no_dropout
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import fit, shape, smooth
from lama.layers import initialise
from lama.models.gpt import GPT
from lama.training.config import TrainingConfig
from lama.training.loop import Trainer

TOKENS, FEATURES, HEADS, STEPS, ROWS = 5, 16, 2, 600, 64


class Finder:
    """Attention alone; its answer is what it says at the last position."""

    def __init__(self, similarity: str, seed: int):
        self.attn = MultiHeadAttention(FEATURES, HEADS, similarity=similarity)
        initialise(self, seed, std=0.1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.attn(x)[:, -1].contiguous()


def flagged(rng: np.random.Generator, matching: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, and what the last position is to say: the rest of the one that is flagged.

    The flag is 3 in the first feature, or, with `matching`, in that of the first four that the last token names: which token is
    meant then depends on the query.
    """
    x = rng.standard_normal((ROWS, TOKENS, FEATURES)).astype(np.float32)
    rows, place, kind = np.arange(ROWS), rng.integers(TOKENS - 1, size=ROWS), rng.integers(4, size=ROWS)
    x[:, :, :4] = 0
    if matching:
        kinds = rng.permuted(np.tile(np.arange(4), (ROWS, 1)), axis=1)
        x[rows[:, None], np.arange(4), kinds] = 3  # each of the four others has a flag of its own
        x[rows, -1, kind] = 3
        place = np.argmax(kinds == kind[:, None], axis=1)
    else:
        x[rows, place, 0] = 3
    return x, x[rows, place, 4:]


def find(options: Options, similarity: str, matching: bool) -> float:
    """The mean squared error of the last steps; guessing has 1."""
    steps = options.steps or STEPS
    config = TrainingConfig(steps, ROWS, learning_rate=1e-2, warmup=steps // 10, weight_decay=0, seed=options.seed)

    def loss(model: Finder, x: Tensor, target: Tensor, smoothing: float = 0, dropout: Dropout = no_dropout) -> Tensor:
        return (model(x)[:, 4:] - target).square().mean()

    trainer = Trainer(
        Finder(similarity, options.seed), lambda step: flagged(np.random.default_rng((options.seed, step)), matching), config, loss
    )
    label = f"{similarity}, {'matching' if matching else 'flagged'}"
    return float(np.mean([step.loss for step in options.watch(trainer, steps, label)][-20:]))


def run(options: Options) -> Report:
    rows: list[tuple[str, float, float, float]] = []
    curves = []
    for name in SIMILARITIES:
        text = fit(options, f"{name}, text", GPT(shape(similarity=name), options.seed))
        rows.append((name, find(options, name, False), find(options, name, True), text.heldout))
        curves.append(Curve(name, range(len(text.losses)), smooth(text.losses)))
    by_name = {row[0]: row for row in rows}
    content = [by_name[name] for name in ("dot", "scaled_dot", "general")]
    return Report(
        [Table(("similarity", "error, flagged token", "error, token that the query names", "held-out loss on text"), rows)],
        [Panel("language model, training loss", "step", "nats per character", curves)],
        {
            "all four find a flagged token": all(row[1] < 0.5 for row in rows),
            "the additive one cannot find what the query names: its query is the same for every key and the softmax cancels it": by_name[
                "additive"
            ][2]
            > 0.5
            and all(row[2] < 0.5 for row in content),
            "so it is the worst of the four on text": all(by_name["additive"][3] > row[3] for row in content),
        },
    )
