"""Compare four scores of a query and a key, in a search task and on text. Source: Luong et al. 2015."""

from dataclasses import replace

import numpy as np
from tinygrad import Tensor

from lama.attention import SIMILARITIES, MultiHeadAttention, make_similarity
from lama.experiments.report import Options, Report, Table
from lama.experiments.text import fit, loss_panel, shape
from lama.layers import initialise
from lama.models.gpt import GPT
from lama.shapes import Array
from lama.training.loop import Trainer
from lama.training.settings.base import TrainingConfig

TOKENS, FEATURES, HEADS, STEPS, ROWS = 5, 16, 2, 600, 64


class Finder:
    """An attention layer that answers at the last position."""

    def __init__(self, similarity: str, seed: int):
        score = make_similarity(similarity, HEADS, FEATURES // HEADS)
        self.attn = MultiHeadAttention(FEATURES, HEADS, similarity=score)
        initialise(self, seed, std=0.1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.attn(x)[:, -1].contiguous()


def flagged(rng: np.random.Generator, matching: bool) -> tuple[Array, Array]:
    """Random tokens, and the last position's target: the other features of the flagged token.

    The flag is a 3 in the first feature, or, with `matching`, in the one of four that the last token names.
    """
    x = rng.standard_normal((ROWS, TOKENS, FEATURES)).astype(np.float32)
    rows, place, kind = np.arange(ROWS), rng.integers(TOKENS - 1, size=ROWS), rng.integers(4, size=ROWS)
    x[:, :, :4] = 0
    if matching:
        kinds = rng.permuted(np.tile(np.arange(4), (ROWS, 1)), axis=1)
        x[rows[:, None], np.arange(4), kinds] = 3  # each of the four others has a different flag
        x[rows, -1, kind] = 3
        place = np.argmax(kinds == kind[:, None], axis=1)
    else:
        x[rows, place, 0] = 3
    return x, x[rows, place, 4:]


def find(options: Options, similarity: str, matching: bool) -> float:
    """The mean squared error of the last 20 steps; without any search it is 1."""
    steps = options.steps or STEPS
    config = TrainingConfig(
        steps, ROWS, learning_rate=1e-2, warmup=steps // 10, weight_decay=0, seed=options.seed
    )

    def loss(model: Finder, x: Tensor, target: Tensor, **unused: object) -> Tensor:
        return (model(x)[:, 4:] - target).square().mean()

    def batches(step: int) -> tuple[Array, Array]:
        return flagged(np.random.default_rng((options.seed, step)), matching)

    trainer = Trainer(Finder(similarity, options.seed), batches, config, loss)
    label = f"{similarity}, {'matching' if matching else 'flagged'}"
    return float(np.mean([step.loss for step in options.watch(trainer, steps, label)][-20:]))


def run(options: Options) -> Report:
    fits, rows = {}, {}
    for name in SIMILARITIES:
        fits[name] = fit(options, f"{name}, text", GPT(replace(shape(), similarity=name), options.seed))
        rows[name] = find(options, name, False), find(options, name, True), fits[name].heldout
    additive, content = rows["additive"], [rows[name] for name in ("dot", "scaled_dot", "general")]
    errors = ("error, flagged token", "error, token that the query names")
    lost = additive[1] > 0.5 and all(row[1] < 0.5 for row in content)
    table = [(name, *row) for name, row in rows.items()]
    return Report(
        [Table(("similarity", *errors, "held-out loss on text"), table)],
        [loss_panel(fits, "language model, training loss")],
        {
            "all four find a flagged token": all(row[0] < 0.5 for row in rows.values()),
            "additive scores cannot find the token that the query names: the softmax cancels the query": lost,
            "so they are the worst on text": all(additive[2] > row[2] for row in content),
        },
    )
