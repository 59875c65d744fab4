"""Induction heads: two attention-only layers learn to repeat a sequence, one layer cannot.

A head of the first layer copies to each token the token before it. A head of the second layer attends to the
position after an earlier copy of the current token, and predicts the token there. Sources: Elhage et al.
2021; Olsson et al. 2022.
"""

import math
from functools import partial

import numpy as np
from tinygrad import Tensor

from lama.experiments.report import Curve, Options, Panel, Report, Table, column_curve
from lama.experiments.resumable import Resumable
from lama.interp.heads import HeadScores, composition, head_scores, repeated_tokens
from lama.interp.pictures import HeatMap
from lama.interp.record import run_with_cache
from lama.layers import initialise
from lama.models.gpt import GPT, GPTConfig
from lama.models.registry import n_parameters
from lama.shapes import Array
from lama.taps import Tap, no_tap, replace
from lama.training.loop import Trainer
from lama.training.settings.base import TrainingConfig

VOCABULARY, LENGTH, D_MODEL, HEADS = 128, 85, 48, 4
BEGIN = 0  # the first token of every row
REPEATED, COPIES = 16, 3  # length and number of the repeated sequences in a row
ROWS, STEPS, EVALUATE_EVERY = 128, 2000, 50
COPIED = 32  # length of the sequence that is repeated once in evaluation
EVALUATED = 16  # evaluation rows
SHOWN = 24  # length of the repeated sequence in the picture of two heads


def batch(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """n rows of random tokens with one sequence three times: inputs and targets, (n, LENGTH) each."""
    tokens = rng.integers(1, VOCABULARY, size=(n, LENGTH + 1)).astype(np.int32)
    tokens[:, 0] = BEGIN
    others = LENGTH - COPIES * REPEATED
    # The number of other tokens before each copy.
    before = np.sort(rng.integers(others + 1, size=(n, COPIES)), axis=1)
    starts = 1 + before + REPEATED * np.arange(COPIES)
    places = starts[:, :, None] + np.arange(REPEATED)  # (n, COPIES, REPEATED)
    tokens[np.arange(n)[:, None, None], places] = rng.integers(1, VOCABULARY, size=(n, 1, REPEATED))
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def evaluate(model: GPT, tokens: Array, tap: Tap = no_tap) -> tuple[float, float]:
    """Losses, in nats per token, of both copies r in rows [begin] r r; the second without its first token."""
    logits = model(Tensor(tokens[:, :-1]), tap=tap).numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    found = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    half = found.shape[1] // 2
    return float(found[:, :half].mean()), float(found[:, half + 1 :].mean())


def fit(options: Options, layers: int) -> tuple[GPT, Array]:
    """A trained model and its log (n, 3 + 2 · layers · HEADS).

    Columns: step, loss on both copies, each head's previous-token score, each head's induction score.
    """
    shape = GPTConfig(
        VOCABULARY, LENGTH, D_MODEL, layers, HEADS, bias=False, tied=False, norm="none", mlp=False
    )
    model = GPT(shape, seed=None)
    initialise(model, options.seed, std=D_MODEL**-0.5)
    steps = options.steps or STEPS
    config = TrainingConfig(
        steps,
        ROWS,
        learning_rate=3e-3,
        warmup=10,
        weight_decay=0.1,
        beta2=0.999,
        gradient_clip=0,
        seed=options.seed,
    )
    trainer = Trainer(model, lambda step: batch(np.random.default_rng((options.seed, step)), ROWS), config)
    name = f"{layers} layers" if layers > 1 else "1 layer"
    training = Resumable(options, name, trainer, columns=3 + 2 * layers * HEADS)
    tokens = heldout_rows(options)
    for step in training:
        if step.step % EVALUATE_EVERY == 0 or step.step == steps:
            scores = scored(model, options)
            first, second = evaluate(model, tokens)
            heads = np.stack([scores.previous_token, scores.induction]).reshape(-1).tolist()
            training.log.append((step.step, first, second, *heads))
            best = f"best induction score {scores.induction.max():.2f}"
            options.say(f"loss on the first copy {first:.2f}, the second {second:.2f}, {best}")
    training.save()
    return model, np.array(training.log)


def heldout_rows(options: Options) -> Array:
    """Held-out rows [begin] r r: (EVALUATED, 1 + 2 · COPIED)."""
    return repeated_tokens(EVALUATED, COPIED, VOCABULARY, BEGIN, options.seed + 1)


def scored(model: GPT, options: Options) -> HeadScores:
    """Scores of all heads, on other random rows."""
    return head_scores(model, COPIED, 4, BEGIN, options.seed + 2)


def without(*heads: tuple[int, int]) -> Tap:
    """A tap that removes the outputs of these heads (layer, head)."""

    def silence(layer: int, z: Tensor) -> Tensor:
        keep = [float((layer, head) not in heads) for head in range(HEADS)]
        return z * Tensor(keep).reshape(1, HEADS, 1, 1)

    return replace({f"blocks.{layer}.attn.z": partial(silence, layer) for layer in range(2)})


def run(options: Options) -> Report:
    model, log = fit(options, 2)
    control, control_log = fit(options, 1)
    tokens = heldout_rows(options)
    first, second = evaluate(model, tokens)
    control_losses = evaluate(control, tokens)
    scores, reads = scored(model, options), composition(model, "k")[0, :, 1]  # (HEADS, HEADS)
    writer, reader = np.unravel_index(reads.argmax(), reads.shape)

    def cost(*heads: tuple[int, int]) -> float:
        """The rise of the second copy's loss without these heads, in nats per token."""
        return evaluate(model, tokens, without(*heads))[1] - second

    inductive = [(1, int(head)) for head in np.flatnonzero(scores.induction[1] >= 0.5)]
    cost_of_all = cost(*inductive)
    uniform = math.log(VOCABULARY)
    models = [
        ("2 layers", n_parameters(model), first, second, second / uniform),
        ("1 layer", n_parameters(control), *control_losses, control_losses[1] / uniform),
    ]
    rows: list[tuple[object, ...]] = []
    for at in np.ndindex(2, HEADS):
        score = float(scores.previous_token[at]), float(scores.induction[at])
        rows.append((f"{at[0]}.{at[1]}", *score, cost(at)))
    together = " and ".join(f"{layer}.{head}" for layer, head in inductive) or "none"
    written = [(f"written by 0.{head}", *reads[head].tolist()) for head in range(HEADS)]
    composed = scores.previous_token[0, writer] >= 0.5 and scores.induction[1, reader] >= 0.5
    repeats = second < uniform / 4
    best_previous, follows = scores.previous_token[0].max(), scores.induction[1].max() >= 0.6
    needed, one_layer = cost_of_all >= 1, control_losses[1]
    readers = [f"read by 1.{head}" for head in range(HEADS)]
    columns = ("head", "previous-token", "induction", "rise of the second copy's loss without it")
    return Report(
        [
            Table(("attention alone", "parameters", "loss, first copy", "second copy", "of ln V"), models),
            Table(columns, [*rows, (together, "", "", cost_of_all)]),
            Table(("K-composition", *readers), written),
        ],
        panels(log, control_log),
        {
            "two layers learn to repeat: the second copy's loss is below a quarter of ln V": repeats,
            "and nothing else: the first copy's loss is ln V, within 3 %": abs(first / uniform - 1) < 0.03,
            "a head of the first layer attends to the token before: score 0.5 or more": best_previous >= 0.5,
            "a head of the second attends to the token after an earlier copy: score 0.6 or more": follows,
            "of all pairs of heads, two such heads have the highest K-composition": composed,
            "without the induction heads (score 0.5 or more) the second copy's loss rises by a nat": needed,
            "one layer cannot: its loss on the second copy is still 90 % of ln V": one_layer >= 0.9 * uniform,
        },
        maps(model, tokens, scores, reads),
    )


def panels(log: Array, control: Array) -> list[Panel]:
    copies = [
        column_curve("2 layers, first copy", log, 1),
        column_curve("2 layers, second copy", log, 2),
        column_curve("1 layer, second copy", control, 2),
        Curve("ln V", [log[0, 0], log[-1, 0]], [math.log(VOCABULARY)] * 2),
    ]
    heads = [column_curve(f"0.{h}, previous token", log, 3 + h) for h in range(HEADS)]
    heads += [column_curve(f"1.{h}, induction", log, 3 + 3 * HEADS + h) for h in range(HEADS)]
    return [
        Panel("random tokens, repeated", "step", "nats per token", copies),
        Panel("head scores", "step", "score", heads),
    ]


def maps(model: GPT, tokens: Array, scores: HeadScores, reads: Array) -> list[HeatMap]:
    """Heat maps of scores, composition, and two heads' attention on a repeated sequence."""
    heads, layers = [str(h) for h in range(HEADS)], ["0", "1"]
    row = [BEGIN, *2 * tokens[0, 1 : SHOWN + 1].tolist()]
    _, cache = run_with_cache(model, row, "blocks.*.attn.pattern")
    patterns, labels = cache.layers("attn.pattern"), list(map(str, row))
    axes = "read by head of layer 1", "written by head of layer 0"
    previous, induction = int(scores.previous_token[0].argmax()), int(scores.induction[1].argmax())
    drawn = partial(HeatMap, low=0, high=1)
    return [
        drawn(scores.previous_token, "previous-token score", layers, heads, "head", "layer"),
        drawn(scores.induction, "induction score", layers, heads, "head", "layer"),
        HeatMap(reads, "K-composition", heads, heads, *axes),
        drawn(patterns[0, 0, previous], f"head 0.{previous}", labels, labels),
        drawn(patterns[1, 0, induction], f"head 1.{induction}", labels, labels),
    ]
