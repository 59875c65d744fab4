"""Grokking: a transformer for addition modulo p memorises its training pairs and generalises much later.

Sources: Power et al. 2022; Nanda et al. 2023, "Progress measures for grokking via mechanistic
interpretability".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.experiments.report import Curve, Options, Panel, Report, Table, column_curve
from lama.experiments.resumable import Resumable
from lama.interp.fourier import excluded, key_frequencies, restricted, spectrum, sum_spectrum, tuned
from lama.interp.pictures import HeatMap
from lama.interp.record import run_with_cache
from lama.layers import initialise
from lama.models.gpt import GPT, GPTConfig
from lama.ops import add
from lama.runtime.capture import CapturedStep
from lama.shapes import Array
from lama.training.loop import Trainer
from lama.training.settings.base import TrainingConfig

HEADS = 4
KNOWN, MEMORISED, GENERALISED, NOT_GENERALISED = 0.99, 0.15, 0.95, 0.6  # accuracies
TIDY = 1e-3  # nats: the test loss once memorisation has been cleaned up
TRAIN, TEST = 3, 4  # the accuracy columns of the log
ONE_FREQUENCY = 0.85  # least share of variance for a neuron tuned to one frequency
LIVE = 1e-3  # least variance of an active neuron, relative to the most active one


@dataclass(frozen=True)
class Setting:
    """Sizes and training settings."""

    p: int
    share: float
    """Share of all pairs used for training."""
    d_model: int
    d_mlp: int
    learning_rate: float
    steps: int
    """The largest number of steps; training ends earlier once the model generalises."""
    memorised_by: int
    """The step by which the training pairs are memorised."""
    evaluate_every: int
    snapshot_every: int
    tidy: int
    """The least number of steps after generalisation, in which memorisation is cleaned up."""


QUICK = Setting(
    59, 0.35, 64, 256, 1e-2, 2500, memorised_by=150, evaluate_every=10, snapshot_every=25, tidy=300
)
PAPER = Setting(
    113, 0.3, 128, 512, 1e-3, 40_000, memorised_by=300, evaluate_every=50, snapshot_every=250, tidy=2000
)


class Addition:
    """All pairs below p as tokens a, b, = with sums modulo p; `examples` masks those for training."""

    def __init__(self, p: int, share: float, seed: int):
        self.p = p
        a, b = np.divmod(np.arange(p * p), p)
        self.tokens = np.stack([a, b, np.full(p * p, p)], axis=1).astype(np.int32)  # (p², 3)
        self.sums = ((a + b) % p).astype(np.int32)  # (p²,)
        self.examples = np.random.default_rng(seed).permutation(p * p) < int(share * p * p)

    def losses(self, logits: Array) -> Array:
        """−log softmax(logits)[sum] of every pair in nats: (p², p) -> (p²,), float64."""
        logits = logits.reshape(self.p**2, self.p).astype(np.float64)
        logits = logits - logits.max(1, keepdims=True)
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(self.p**2), self.sums]

    def loss(self, logits: Array, held_out: bool) -> float:
        """The mean of `losses` over the training pairs or, if `held_out`, over the test pairs."""
        return float(self.losses(logits)[self.examples != held_out].mean())


def answers(model: GPT, tokens: Tensor) -> Tensor:
    """Logits of the numbers after =, for a GPT of one block without norms: (B, 3) -> (B, p)."""
    (block,) = model.blocks
    x = model.embedded(tokens)
    last = x[:, -1:].contiguous()  # the last token attends to all: no mask
    last = add(last, block.attn(last, memory=x))
    assert block.mlp is not None
    last = add(last, block.mlp(last))
    return model.logits(last)[:, 0, : model.config.vocab_size - 1]


def on_all_pairs(model: GPT, task: Addition) -> Callable[[], Array]:
    """A function that computes the model's answers to all pairs: (p², p)."""
    pairs = Tensor(task.tokens).realize()
    step = CapturedStep(lambda tokens: answers(model, tokens).realize())
    return lambda: step(pairs).numpy()


def loss(model: GPT, tokens: Tensor, sums: Tensor, **unused: object) -> Tensor:
    """Mean cross-entropy in float64: in float32, probabilities near 1 have no gradient.

    Source: Nanda et al. 2023, appendix A.
    """
    return -answers(model, tokens).double().log_softmax().gather(1, sums.reshape(-1, 1)).mean().float()


@dataclass(frozen=True)
class GrokkingFit:
    """A trained model with its log and the weights during training."""

    model: GPT
    log: Array
    """(n, 6): step, train and test loss, train and test accuracy, sum of squared weights."""
    snapshots: dict[int, dict[str, Array]]

    def first(self, column: int, accuracy: float) -> float:
        """The first step with this accuracy in the column, or infinity."""
        reached = self.log[self.log[:, column] >= accuracy, 0]
        return float(reached[0]) if len(reached) else math.inf


def fit(
    options: Options, setting: Setting, task: Addition, name: str, weight_decay: float, steps: int
) -> GrokkingFit:
    """Train until the model generalises, or for `steps`."""
    s = setting
    shape = GPTConfig(
        s.p + 1, 3, s.d_model, 1, HEADS, s.d_mlp, bias=False, tied=False, activation="relu", norm="none"
    )
    model = GPT(shape, seed=None)
    initialise(model, seeds(options)[1], std=s.d_model**-0.5)
    batch = task.tokens[task.examples], task.sums[task.examples]
    config = TrainingConfig(
        steps,
        len(batch[0]),
        learning_rate=s.learning_rate,
        warmup=min(10, steps),
        schedule="constant",
        weight_decay=weight_decay,
        beta2=0.98,
        gradient_clip=0,
        seed=options.seed,
    )
    training = Resumable(options, name, Trainer(model, lambda step: batch, config, loss), columns=6)
    look = on_all_pairs(model, task)
    done = generalised(training.log, s)
    for step in [] if done else training:
        if step.step % s.evaluate_every == 0 or step.step == steps:
            squares = sum(float((p.numpy() ** 2).sum()) for p in training.trainer.parameters.values())
            training.log.append((step.step, *evaluate(task, look()), squares))
            latest = training.log[-1]
            options.say(f"test loss {latest[2]:.3g}, accuracy {latest[TEST]:.1%}")
            done = generalised(training.log, s)
        if step.step % s.snapshot_every == 0 or step.step == steps or done:
            training.snapshot()
        if done:
            break
    training.save()
    return GrokkingFit(model, np.array(training.log), training.snapshots)


def evaluate(task: Addition, logits: Array) -> tuple[float, float, float, float]:
    """Train and test loss, train and test accuracy."""
    right = logits.argmax(1) == task.sums
    accuracies = float(right[task.examples].mean()), float(right[~task.examples].mean())
    return task.loss(logits, held_out=False), task.loss(logits, held_out=True), *accuracies


def seeds(options: Options) -> tuple[int, int]:
    """Independent seeds for the choice of training pairs and for the weights."""
    examples, weights = np.random.SeedSequence(options.seed).generate_state(2)
    return int(examples), int(weights)


def generalised(log: list[tuple[float, ...]], setting: Setting) -> bool:
    """Whether the test loss is low, and the test pairs have been solved for a fifth of the steps before."""
    since = next((row[0] for row in log if row[TEST] >= KNOWN), math.inf)
    if not log or log[-1][0] < since + max(setting.tidy, since / 5):
        return False
    return log[-1][TEST] >= KNOWN and log[-1][2] <= TIDY


@dataclass(frozen=True)
class Inside:
    """Fourier analysis of a trained model on all pairs, at the last position."""

    logits: Array
    """(p, p, p) by a, b and answer."""
    neurons: Array
    """(p, p, n): the active ones."""
    attention: Array
    """(H, p, p, 3)."""
    of_logits: Array
    """Share of the logits' variance in waves of a + b, by frequency."""
    of_embedding: Array
    """Share of the embedding's squares, by frequency."""
    keys: list[int]
    """The key frequencies of the logits."""
    tuned_to: Array
    """The frequency that explains most of each neuron."""
    explained: Array
    """The share of the neuron's variance that it explains."""

    @property
    def in_keys(self) -> float:
        """The share of the logits' variance in the key frequencies."""
        return float(sum(self.of_logits[k - 1] for k in self.keys))


def look_inside(model: GPT, task: Addition) -> Inside:
    """Run the model on all pairs, and analyse its logits, neurons and embedding."""
    p, names = task.p, ("logits", "blocks.0.mlp.post", "blocks.0.attn.pattern")
    _, cache = run_with_cache(model, task.tokens, *names)
    logits, post, pattern = (cache[name][..., -1, :] for name in names)
    logits, neurons = logits[:, :p].reshape(p, p, p).astype(np.float64), post.reshape(p, p, -1)
    variances = neurons.var((0, 1))
    neurons = neurons[:, :, variances > LIVE * variances.max()]
    of_logits = sum_spectrum(logits)
    assert isinstance(model.embed.weight, Tensor)
    return Inside(
        logits,
        neurons,
        pattern.transpose(1, 0, 2).reshape(-1, p, p, 3),
        of_logits,
        spectrum(model.embed.weight.numpy()[:p]),
        key_frequencies(of_logits),
        *tuned(neurons),
    )


def progress(fit: GrokkingFit, task: Addition, keys: list[int]) -> Array:
    """(n, 3) by snapshot: step, restricted loss of the test pairs, excluded loss of the training pairs.

    Restricted: by the key frequencies alone. Excluded: without them. Source: Nanda et al. 2023.
    """
    parameters, look, rows = get_state_dict(fit.model), on_all_pairs(fit.model, task), []
    for step, weights in sorted(fit.snapshots.items()):  # the last one has the final weights
        Tensor.realize(*(p.assign(Tensor(weights[name])) for name, p in parameters.items()))
        logits = look().reshape(task.p, task.p, task.p).astype(np.float64)
        by_keys = task.loss(restricted(logits, keys), held_out=True)
        rows.append((step, by_keys, task.loss(excluded(logits, keys), held_out=False)))
    return np.array(rows)


def run(options: Options) -> Report:
    setting = PAPER if options.full else QUICK
    task = Addition(setting.p, setting.share, seeds(options)[0])
    decay = fit(options, setting, task, "weight decay", 1.0, options.steps or setting.steps)
    steps = int(min(decay.first(TEST, KNOWN), decay.log[-1, 0]))
    control = fit(options, setting, task, "no weight decay", 0.0, steps)
    inside = look_inside(decay.model, task)
    measures = progress(decay, task, inside.keys)
    fits = {"weight decay": decay, "no weight decay": control}
    return Report(
        tables(task, inside, measures, fits),
        panels(inside, measures, fits),
        claims(setting, task, inside, measures, decay, control),
        maps(inside),
    )


def tables(task: Addition, inside: Inside, measures: Array, fits: dict[str, GrokkingFit]) -> list[Table]:
    reached = ((TRAIN, KNOWN), (TEST, 0.5), (TEST, GENERALISED))
    steps = f"train accuracy {KNOWN:.0%} at", "test accuracy 50% at", f"test accuracy {GENERALISED:.0%} at"
    results = "train loss", "test loss", "test accuracy"
    trainings = []
    for name, fit in fits.items():
        first = [fit.first(column, accuracy) for column, accuracy in reached]
        at = [int(step) if math.isfinite(step) else "never" for step in first]
        trainings.append((name, int(fit.log[-1, 0]), *at, *fit.log[-1, [1, 2, TEST]]))
    clear = inside.explained > ONE_FREQUENCY
    frequencies = []
    for k in inside.keys:
        tuned_neurons = int((clear & (inside.tuned_to == k)).sum())
        without = task.loss(excluded(inside.logits, [k]), held_out=True)
        frequencies.append((k, inside.of_logits[k - 1], inside.of_embedding[k - 1], tuned_neurons, without))
    shares = "share of the logits' variance", "of the embedding"
    findings = [
        ("share of the logits' variance in the key frequencies", inside.in_keys),
        ("in all frequencies", inside.of_logits.sum()),
        ("active neurons", len(inside.explained)),
        (f"of these, explained to over {ONE_FREQUENCY:.0%} by one frequency", int(clear.sum())),
        ("test loss", task.loss(inside.logits, held_out=True)),
        ("restricted loss (key frequencies alone), test", measures[-1, 1]),
        ("excluded loss (without them), train", measures[-1, 2]),
        ("loss of uniform predictions, ln p", math.log(task.p)),
    ]
    heads = [(f"head {h}", *pattern.mean((0, 1)).tolist()) for h, pattern in enumerate(inside.attention)]
    return [
        Table((f"a + b mod {task.p}", "steps", *steps, *results), trainings),
        Table(("key frequency", *shares, "neurons tuned to it", "test loss without it"), frequencies),
        Table(("at the end", ""), findings),
        Table(("attention of =, mean", "to a", "to b", "to ="), heads),
    ]


def panels(inside: Inside, measures: Array, fits: dict[str, GrokkingFit]) -> list[Panel]:
    def both(column: int) -> list[Curve]:
        """Curves of training pairs, in this column of the logs, and of test pairs, in the next."""
        curves = []
        for name, fit in fits.items():
            curves.append(column_curve(f"train, {name}", fit.log, column))
            curves.append(column_curve(f"test, {name}", fit.log, column + 1))
        return curves

    log = fits["weight decay"].log
    progress_measures = [
        column_curve("train", log, 1),
        column_curve("test", log, 2),
        column_curve("restricted, test", measures, 1),
        column_curve("excluded, train", measures, 2),
    ]
    waves = range(1, len(inside.of_logits) + 1)
    spectra = [
        Curve("embedding", waves, inside.of_embedding.tolist()),
        Curve("logits, of a + b", waves, inside.of_logits.tolist()),
    ]
    numbers = range(1, len(inside.explained) + 1)
    neurons = Curve("active neurons", numbers, np.sort(inside.explained)[::-1].tolist())
    squares = [column_curve(name, fit.log, 5) for name, fit in fits.items()]
    return [
        Panel("loss", "step", "nats", both(1), logarithmic="xy"),
        Panel("accuracy", "step", "accuracy", both(TRAIN), logarithmic="x"),
        Panel("restricted and excluded loss", "step", "nats", progress_measures, logarithmic="y"),
        Panel("weights", "step", "sum of squared weights", squares),
        Panel("Fourier components", "frequency", "share of the variance", spectra, bars=True),
        Panel("neurons, sorted", "neuron", "variance explained by one frequency", [neurons]),
    ]


def maps(inside: Inside) -> list[HeatMap]:
    """Over all pairs: the heads, and the best tuned neuron of each key frequency."""
    found = []
    for h, pattern in enumerate(inside.attention):
        found.append(HeatMap(pattern[:, :, 0], f"head {h}: to a", x="b", y="a", low=0, high=1))
    for k in inside.keys:
        if (inside.tuned_to == k).any():
            best = np.argmax(inside.explained * (inside.tuned_to == k))
            found.append(HeatMap(inside.neurons[:, :, best], f"a neuron of frequency {k}", x="b", y="a"))
    return found


def claims(
    setting: Setting,
    task: Addition,
    inside: Inside,
    measures: Array,
    decay: GrokkingFit,
    control: GrokkingFit,
) -> dict[str, bool]:
    known, later = decay.first(TRAIN, KNOWN), decay.first(TEST, GENERALISED)
    test_then = decay.log[decay.log[:, 0] <= known, TEST][-1]
    test_loss, uniform = task.loss(inside.logits, held_out=True), math.log(task.p)
    memorised = known < setting.memorised_by and test_then <= MEMORISED
    fails_without = measures[-1, 2] > uniform / 2
    few_keys = len(inside.keys) <= 6 and inside.in_keys >= 0.9
    first = f"{KNOWN:.0%} of the training pairs before step {setting.memorised_by}"
    control_fails = control.log[:, TEST].max() < NOT_GENERALISED
    return {
        f"it memorises first: {first}, with at most {MEMORISED:.0%} of the test pairs": memorised,
        "meanwhile its test loss is worse than that of uniform predictions": decay.log[:, 2].max() > uniform,
        f"it generalises much later: {GENERALISED:.0%} of the test pairs after more than 8 times as many "
        "steps": 8 * known < later < math.inf,
        f"without weight decay it does not: less than {NOT_GENERALISED:.0%} of the test pairs in as many "
        "steps": control_fails,
        "at most 6 frequencies have at least 90 % of the logits' variance": few_keys,
        "with these alone (restricted) the test loss is as low, or lower": measures[-1, 1] <= test_loss,
        "without these (excluded) the train loss is above half of ln p": fails_without,
    }
