"""Induction heads: two layers of attention alone learn to go on as they did before, one layer cannot.

A head of the first layer tells each token which one came before it; a head of the second looks for the place after an earlier token like
the present one, and says what stands there. Sources: Elhage et al. 2021; Olsson et al. 2022.
"""

import math
from functools import partial

import numpy as np
from tinygrad import Tensor

from lama.experiments.kept import Kept
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.interp.heads import HeadScores, composition, head_scores, repeated_tokens
from lama.interp.pictures import HeatMap
from lama.layers import initialise
from lama.models.gpt import GPT, GPTConfig
from lama.taps import Recorder, Tap, no_tap, replace
from lama.training.config import TrainingConfig
from lama.training.loop import Trainer

VOCABULARY, LENGTH, D_MODEL, HEADS = 128, 85, 48, 4
BEGIN = 0  # the token that every row begins with
REPEATED, COPIES = 16, 3  # tokens, and how often they stand in a row
ROWS, STEPS, JUDGE_EVERY = 128, 2000, 50
SAID = 32  # tokens that are said twice, to judge by
JUDGED = 16  # rows of them
SHOWN = 24  # tokens said twice in the picture of two heads


def batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n rows of random tokens in which some stand three times, at random places: inputs and targets, (n, LENGTH) each."""
    tokens = rng.integers(1, VOCABULARY, size=(n, LENGTH + 1)).astype(np.int32)
    tokens[:, 0] = BEGIN
    others = LENGTH - COPIES * REPEATED
    before = np.sort(rng.integers(others + 1, size=(n, COPIES)), axis=1)  # how many of the others stand before each copy
    starts = 1 + before + REPEATED * np.arange(COPIES)
    places = starts[:, :, None] + np.arange(REPEATED)  # (n, COPIES, REPEATED)
    tokens[np.arange(n)[:, None, None], places] = rng.integers(1, VOCABULARY, size=(n, 1, REPEATED))
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def judge(model: GPT, tokens: np.ndarray, tap: Tap = no_tap) -> tuple[float, float]:
    """Nats a token in the first copy of rows [begin] r r, and in the second but for its first token, which nothing foretells."""
    logits = model(Tensor(tokens[:, :-1]), tap=tap).numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    found = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    half = found.shape[1] // 2
    return float(found[:, :half].mean()), float(found[:, half + 1 :].mean())


def fit(options: Options, layers: int) -> tuple[GPT, np.ndarray]:
    """A trained model and its log: step, loss on the first copy and on the second, each head's previous-token score, each one's induction
    score; (n, 3 + 2 · layers · HEADS)."""
    model = GPT(GPTConfig(VOCABULARY, LENGTH, D_MODEL, layers, HEADS, bias=False, tied=False, norm="none", mlp=False), seed=None)
    initialise(model, options.seed, std=D_MODEL**-0.5)
    steps = options.steps or STEPS
    config = TrainingConfig(steps, ROWS, learning_rate=3e-3, warmup=10, weight_decay=0.1, beta2=0.999, gradient_clip=0, seed=options.seed)
    trainer = Trainer(model, lambda step: batch(np.random.default_rng((options.seed, step)), ROWS), config)
    kept = Kept(options, f"{layers} layer{'s' if layers > 1 else ''}", trainer, columns=3 + 2 * layers * HEADS)
    tokens = judged(options)
    for step in kept:
        if step.step % JUDGE_EVERY == 0 or step.step == steps:
            scores = scored(model, options)
            first, second = judge(model, tokens)
            kept.log.append((step.step, first, second, *scores.previous_token.reshape(-1), *scores.induction.reshape(-1)))
            options.say(f"first copy {first:.2f}, second {second:.2f}, best induction score {scores.induction.max():.2f}")
    kept.save()
    return model, np.array(kept.log)


def judged(options: Options) -> np.ndarray:
    """Rows [begin] r r that no training has seen: (JUDGED, 1 + 2 · SAID)."""
    return repeated_tokens(JUDGED, SAID, VOCABULARY, BEGIN, options.seed + 1)


def scored(model: GPT, options: Options) -> HeadScores:
    return head_scores(model, SAID, 4, BEGIN, options.seed + 2)


def without(*heads: tuple[int, int]) -> Tap:
    """The model's run without what these heads, (layer, head), hand on."""

    def silence(layer: int, z: Tensor) -> Tensor:
        keep = [float((layer, head) not in heads) for head in range(HEADS)]
        return z * Tensor(keep).reshape(1, HEADS, 1, 1)

    return replace({f"blocks.{layer}.attn.z": partial(silence, layer) for layer in range(2)})


def run(options: Options) -> Report:
    model, log = fit(options, 2)
    control, control_log = fit(options, 1)
    tokens = judged(options)
    (first, second), (_, control_second) = judge(model, tokens), judge(control, tokens)
    scores, reads = scored(model, options), composition(model, "k")[0, :, 1]  # (HEADS, HEADS)
    writer, reader = np.unravel_index(reads.argmax(), reads.shape)
    previous, induction = int(scores.previous_token[0].argmax()), int(scores.induction[1].argmax())
    lost = np.array([[judge(model, tokens, without((layer, head)))[1] - second for head in range(HEADS)] for layer in range(2)])
    inductive = [(1, int(head)) for head in np.flatnonzero(scores.induction[1] >= 0.5)]
    lost_together = judge(model, tokens, without(*inductive))[1] - second
    uniform = math.log(VOCABULARY)
    return Report(
        [
            Table(
                ("attention alone", "parameters", "loss, first copy", "second copy", "of ln V"),
                [
                    (name, m.n_parameters(), *losses, losses[1] / uniform)
                    for name, m, losses in (("2 layers", model, (first, second)), ("1 layer", control, judge(control, tokens)))
                ],
            ),
            Table(
                ("head", "previous-token", "induction", "second copy costs more without it"),
                [
                    *(
                        (f"{layer}.{head}", *(float(x[layer, head]) for x in (scores.previous_token, scores.induction, lost)))
                        for layer in range(2)
                        for head in range(HEADS)
                    ),
                    (" and ".join(f"{layer}.{head}" for layer, head in inductive) or "none", "", "", lost_together),
                ],
            ),
            Table(
                ("K-composition", *(f"read by 1.{head}" for head in range(HEADS))),
                [(f"written by 0.{head}", *reads[head].tolist()) for head in range(HEADS)],
            ),
        ],
        panels(log, control_log),
        {
            "two layers learn to repeat: the second copy costs less than a quarter of ln V": second < uniform / 4,
            "and only that: the first copy costs ln V, within 3 %": abs(first / uniform - 1) < 0.03,
            "a head of the first layer looks at the token before: score 0.5 or more": scores.previous_token[0].max() >= 0.5,
            "a head of the second looks at what came after the present token before: induction score 0.6 or more": scores.induction[1].max()
            >= 0.6,
            "of all pairs of heads, such two are K-composed the most": scores.previous_token[0, writer] >= 0.5
            and scores.induction[1, reader] >= 0.5,
            "without the induction heads (score 0.5 or more) the second copy costs a nat more, or worse": lost_together >= 1,
            "one layer cannot: its second copy still costs 90 % of ln V": control_second >= 0.9 * uniform,
        },
        maps(model, tokens, scores, reads, previous, induction),
    )


def panels(log: np.ndarray, control: np.ndarray) -> list[Panel]:
    steps, uniform = log[:, 0].tolist(), math.log(VOCABULARY)
    copies = [
        Curve("2 layers, first copy", steps, log[:, 1].tolist()),
        Curve("2 layers, second copy", steps, log[:, 2].tolist()),
        Curve("1 layer, second copy", control[:, 0].tolist(), control[:, 2].tolist()),
        Curve("ln V", [steps[0], steps[-1]], [uniform, uniform]),
    ]
    scores = log[:, 3:].reshape(len(log), 2, 2, HEADS)  # step, kind, layer, head
    heads = [Curve(f"0.{h}, previous token", steps, scores[:, 0, 0, h].tolist()) for h in range(HEADS)]
    heads += [Curve(f"1.{h}, induction", steps, scores[:, 1, 1, h].tolist()) for h in range(HEADS)]
    return [Panel("random tokens, said twice", "step", "nats a token", copies), Panel("heads", "step", "score", heads)]


def maps(model: GPT, tokens: np.ndarray, scores: HeadScores, reads: np.ndarray, previous: int, induction: int) -> list[HeatMap]:
    """The scores of all heads, who reads from whom, and what the two heads look at in some tokens said twice."""
    heads, layers = [str(h) for h in range(HEADS)], ["0", "1"]
    row = np.concatenate([[BEGIN], tokens[0, 1 : SHOWN + 1], tokens[0, 1 : SHOWN + 1]]).astype(np.int32)
    record = Recorder("blocks.*.attn.pattern")
    model(Tensor(row[None]), tap=record).realize(*record.values())
    labels = [str(token) for token in row]
    looks = (
        HeatMap(record[f"blocks.{layer}.attn.pattern"].numpy()[0, head], f"head {layer}.{head}", labels, labels, low=0, high=1)
        for layer, head in ((0, previous), (1, induction))
    )
    return [
        HeatMap(scores.previous_token, "previous-token score", layers, heads, "head", "layer", low=0, high=1),
        HeatMap(scores.induction, "induction score", layers, heads, "head", "layer", low=0, high=1),
        HeatMap(reads, "K-composition", heads, heads, "read by head of layer 1", "written by head of layer 0"),
        *looks,
    ]
