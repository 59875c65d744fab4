"""Grokking: a transformer that learns to add modulo p first learns its examples by heart, and understands them long after.

Sources: Power et al. 2022; Nanda et al. 2023, "Progress measures for grokking via mechanistic interpretability".
"""

import math
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.dropout import Dropout, no_dropout
from lama.experiments.kept import Kept
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.interp.fourier import excluded, key_frequencies, restricted, spectrum, sum_spectrum, tuned
from lama.interp.pictures import HeatMap
from lama.jit import capture_at_once
from lama.kernels import add
from lama.layers import initialise
from lama.models.gpt import GPT, GPTConfig
from lama.taps import Recorder
from lama.training.config import TrainingConfig
from lama.training.loop import Trainer

HEADS = 4
KNOWN, KNOWN_BY_HEART, UNDERSTOOD, NOT_UNDERSTOOD = 0.99, 0.15, 0.95, 0.6  # accuracies
TIDY = 1e-3  # nats: the loss on the other pairs once what was learned by heart is cleared away
EXAMPLES, OTHERS = 3, 4  # the columns of the log with accuracies
ONE_FREQUENCY = 0.85  # of a neuron's variance, and it is tuned to that frequency
LIVE = 1e-3  # of the most active neuron's variance, and a neuron counts


@dataclass(frozen=True)
class Setting:
    """How large, and how trained."""

    p: int
    share: float
    """Of all pairs, to learn from."""
    d_model: int
    d_mlp: int
    learning_rate: float
    steps: int
    """At most: it ends sooner where all is understood."""
    known_by: int
    """The step by which the examples are known by heart."""
    judge_every: int
    keep_every: int
    tidy: int
    """Least steps after it is understood, in which what was learned by heart is cleared away."""


QUICK = Setting(59, 0.35, 64, 256, 1e-2, 2500, known_by=150, judge_every=10, keep_every=25, tidy=300)
PAPER = Setting(113, 0.3, 128, 512, 1e-3, 40_000, known_by=300, judge_every=50, keep_every=250, tidy=2000)


class Addition:
    """All pairs of numbers below p as the tokens a, b, =, and their sums modulo p; `examples` says which of them are to be learned from."""

    def __init__(self, p: int, share: float, seed: int):
        self.p = p
        a, b = np.divmod(np.arange(p * p), p)
        self.tokens = np.stack([a, b, np.full(p * p, p)], axis=1).astype(np.int32)  # (p², 3)
        self.sums = ((a + b) % p).astype(np.int32)  # (p²,)
        self.examples = np.random.default_rng(seed).permutation(p * p) < int(share * p * p)

    def losses(self, logits: np.ndarray) -> np.ndarray:
        """−log softmax(logits)[sum] for every pair, nats: (p², p) -> (p²,), float64."""
        logits = logits.reshape(self.p**2, self.p).astype(np.float64)
        logits = logits - logits.max(1, keepdims=True)
        losses: np.ndarray = np.log(np.exp(logits).sum(1)) - logits[np.arange(self.p**2), self.sums]
        return losses


def answers(model: GPT, tokens: Tensor) -> Tensor:
    """The logits of the numbers after the last token, and of no other: (B, 3) -> (B, p). For a GPT of one block without norms."""
    (block,) = model.blocks
    x, _ = model.embedded(tokens)
    last = x[:, -1:].contiguous()  # the last position sees all: it needs no mask
    last = add(last, block.attn(last, memory=x))
    assert block.mlp is not None
    last = add(last, block.mlp(last))
    return model.logits(last)[:, 0, : model.config.vocab_size - 1]


def loss(model: GPT, tokens: Tensor, sums: Tensor, smoothing: float = 0.0, dropout: Dropout = no_dropout) -> Tensor:
    """The mean cross-entropy in float64: in float32, a probability near 1 has no gradient left. Source: Nanda et al. 2023, appendix A."""
    return -answers(model, tokens).double().log_softmax().gather(1, sums.reshape(-1, 1)).mean().float()


@dataclass(frozen=True)
class Fit:
    """A trained model, how it got there, and its weights on the way."""

    model: GPT
    log: np.ndarray
    """Rows of step, loss on the examples and on the other pairs, accuracy on them, sum of squared weights: (n, 6)."""
    snapshots: dict[int, dict[str, np.ndarray]]

    def first(self, column: int, accuracy: float) -> float:
        """The first step at which the accuracy in this column was reached; infinity if none."""
        reached = self.log[self.log[:, column] >= accuracy, 0]
        return float(reached[0]) if len(reached) else math.inf


def fit(options: Options, setting: Setting, task: Addition, name: str, weight_decay: float, steps: int) -> Fit:
    """Train until all is understood, and then for a while, or for `steps`."""
    s = setting
    shape = GPTConfig(s.p + 1, 3, s.d_model, 1, HEADS, s.d_mlp, bias=False, tied=False, activation="relu", norm="none")
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
    kept = Kept(options, name, Trainer(model, lambda step: batch, config, loss), columns=6)
    look = capture_at_once(lambda tokens: answers(model, tokens).realize())
    pairs = Tensor(task.tokens).realize()
    done = understood(kept.log, s)
    for step in [] if done else kept:
        if step.step % s.judge_every == 0 or step.step == steps:
            kept.log.append((step.step, *judge(task, look(pairs).numpy()), weight(model)))
            options.say(f"other pairs: loss {kept.log[-1][2]:.3g}, {kept.log[-1][OTHERS]:.1%} right")
            done = understood(kept.log, s)
        if step.step % s.keep_every == 0 or step.step == steps or done:
            kept.snapshot()
        if done:
            break
    kept.save()
    return Fit(model, np.array(kept.log), kept.snapshots)


def judge(task: Addition, logits: np.ndarray) -> tuple[float, float, float, float]:
    """Loss on the examples and on the other pairs, accuracy on the examples and on the others."""
    losses, right = task.losses(logits), logits.argmax(1) == task.sums
    return tuple(float(x[part].mean()) for x in (losses, right) for part in (task.examples, ~task.examples))  # type: ignore[return-value]


def weight(model: GPT) -> float:
    return sum(float((p.numpy() ** 2).sum()) for p in get_state_dict(model).values())


def seeds(options: Options) -> tuple[int, int]:
    """Of the choice of examples, and of the weights: two numbers, so that the one does not follow from the other."""
    examples, weights = np.random.SeedSequence(options.seed).generate_state(2)
    return int(examples), int(weights)


def understood(log: list[tuple[float, ...]], setting: Setting) -> bool:
    """Whether the other pairs are known too, with hardly a loss, and have been for a fifth of the time that it took."""
    since = next((row[0] for row in log if row[OTHERS] >= KNOWN), math.inf)
    return bool(log) and log[-1][0] >= since + max(setting.tidy, since / 5) and log[-1][OTHERS] >= KNOWN and log[-1][2] <= TIDY


@dataclass(frozen=True)
class Inside:
    """A trained model on all pairs, its weights and activations in waves."""

    logits: np.ndarray
    """Of the answers, (p, p, p): a, b, answer."""
    neurons: np.ndarray
    """At the last position, those that are ever active: (p, p, n)."""
    attention: np.ndarray
    """Of the last position, (H, p, p, 3)."""
    of_logits: np.ndarray
    """The share of their variance in waves of a + b, by frequency."""
    of_embedding: np.ndarray
    """The share of its squares, by frequency."""
    keys: list[int]
    """The frequencies that the logits rest on."""
    tuned_to: np.ndarray
    """The frequency that explains most of each neuron."""
    explained: np.ndarray
    """Which share of its variance that is."""


def look_inside(model: GPT, task: Addition) -> Inside:
    p, record = task.p, Recorder("blocks.0.attn.pattern", "blocks.0.mlp.post", "logits")
    model(Tensor(task.tokens), tap=record).realize(*record.values())
    pattern, post, logits = (record[name].numpy()[..., -1, :] for name in record.patterns)
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


def progress(fit: Fit, task: Addition, keys: list[int]) -> np.ndarray:
    """At each snapshot: step, the other pairs' loss by the key frequencies alone, the examples' loss without them: (n, 3)."""
    parameters, rows = get_state_dict(fit.model), []
    look = capture_at_once(lambda tokens: answers(fit.model, tokens).realize())
    pairs = Tensor(task.tokens).realize()
    for step, weights in sorted(fit.snapshots.items()):  # the last one is of the model as it is
        Tensor.realize(*(p.assign(Tensor(weights[name])) for name, p in parameters.items()))
        logits = look(pairs).numpy().reshape(task.p, task.p, task.p).astype(np.float64)
        by_keys, without = task.losses(restricted(logits, keys)), task.losses(excluded(logits, keys))
        rows.append((step, by_keys[~task.examples].mean(), without[task.examples].mean()))
    return np.array(rows)


def run(options: Options) -> Report:
    setting = PAPER if options.full else QUICK
    task = Addition(setting.p, setting.share, seeds(options)[0])
    decay = fit(options, setting, task, "weight decay", 1.0, options.steps or setting.steps)
    control = fit(options, setting, task, "no weight decay", 0.0, int(min(decay.first(OTHERS, KNOWN), decay.log[-1, 0])))
    inside = look_inside(decay.model, task)
    measures = progress(decay, task, inside.keys)
    fits = {"weight decay": decay, "no weight decay": control}
    return Report(
        [trainings(task, fits), frequencies(task, inside), findings(task, inside, measures), heads(inside)],
        panels(inside, measures, fits),
        claims(setting, task, inside, measures, decay, control),
        maps(inside),
    )


def trainings(task: Addition, fits: dict[str, Fit]) -> Table:
    def step(fit: Fit, column: int, accuracy: float) -> str | int:
        return int(at) if math.isfinite(at := fit.first(column, accuracy)) else "never"

    titles = ("steps", f"{KNOWN:.0%} of the examples at", "half of the others at", f"{UNDERSTOOD:.0%} at")
    return Table(
        (f"a + b mod {task.p}", *titles, "loss, examples", "loss, others", "others right"),
        [
            (
                name,
                int(fit.log[-1, 0]),
                step(fit, EXAMPLES, KNOWN),
                step(fit, OTHERS, 0.5),
                step(fit, OTHERS, UNDERSTOOD),
                *fit.log[-1, [1, 2, OTHERS]],
            )
            for name, fit in fits.items()
        ],
    )


def frequencies(task: Addition, inside: Inside) -> Table:
    clear = inside.explained > ONE_FREQUENCY
    return Table(
        ("key frequency", "share of the logits' variance", "of the embedding", "neurons tuned to it", "loss, others, without it"),
        [
            (
                k,
                inside.of_logits[k - 1],
                inside.of_embedding[k - 1],
                int((clear & (inside.tuned_to == k)).sum()),
                task.losses(excluded(inside.logits, [k]))[~task.examples].mean(),
            )
            for k in inside.keys
        ],
    )


def findings(task: Addition, inside: Inside, measures: np.ndarray) -> Table:
    return Table(
        ("at the end", ""),
        [
            ("share of the logits' variance in the key frequencies", in_keys(inside)),
            ("in all frequencies", inside.of_logits.sum()),
            ("neurons that are ever active", len(inside.explained)),
            (f"of these, explained to over {ONE_FREQUENCY:.0%} by one frequency", int((inside.explained > ONE_FREQUENCY).sum())),
            ("loss, others", task.losses(inside.logits)[~task.examples].mean()),
            ("loss, others, by the key frequencies alone (restricted)", measures[-1, 1]),
            ("loss, examples, without them (excluded)", measures[-1, 2]),
            ("loss of guessing, ln p", math.log(task.p)),
        ],
    )


def heads(inside: Inside) -> Table:
    return Table(
        ("attention of =, mean", "to a", "to b", "to ="),
        [(f"head {h}", *pattern.mean((0, 1)).tolist()) for h, pattern in enumerate(inside.attention)],
    )


def in_keys(inside: Inside) -> float:
    """The share of the logits' variance in the key frequencies."""
    return float(sum(inside.of_logits[k - 1] for k in inside.keys))


def panels(inside: Inside, measures: np.ndarray, fits: dict[str, Fit]) -> list[Panel]:
    def both(column: int) -> list[Curve]:
        """Of the examples, in this column of the logs, and of the other pairs, in the next."""
        parts = ((f"{part}, {name}", fit, i) for name, fit in fits.items() for i, part in enumerate(("examples", "others")))
        return [Curve(label, fit.log[:, 0].tolist(), fit.log[:, column + i].tolist()) for label, fit, i in parts]

    step, examples, others = next(iter(fits.values())).log.T[:3].tolist()
    at, by_keys, without = measures.T.tolist()
    rests_on = [
        Curve("examples", step, examples),
        Curve("others", step, others),
        Curve("others, by the key frequencies alone (restricted)", at, by_keys),
        Curve("examples, without them (excluded)", at, without),
    ]
    waves = range(1, len(inside.of_logits) + 1)
    spectra = [Curve("embedding", waves, inside.of_embedding.tolist()), Curve("logits, of a + b", waves, inside.of_logits.tolist())]
    neurons = Curve("neurons that are ever active", range(1, len(inside.explained) + 1), np.sort(inside.explained)[::-1].tolist())
    squares = [Curve(name, fit.log[:, 0].tolist(), fit.log[:, 5].tolist()) for name, fit in fits.items()]
    return [
        Panel("loss", "step", "nats", both(1), logarithmic="xy"),
        Panel("accuracy", "step", "share right", both(EXAMPLES), logarithmic="x"),
        Panel("what the loss rests on", "step", "nats", rests_on, logarithmic="y"),
        Panel("weights", "step", "sum of squares", squares),
        Panel("waves", "frequency", "share of the variance", spectra, bars=True),
        Panel("neurons, sorted", "neuron", "variance that one frequency explains", [neurons]),
    ]


def maps(inside: Inside) -> list[HeatMap]:
    """What the heads and, for each key frequency, the neuron that is tuned to it best do on all pairs."""
    found = [HeatMap(pattern[:, :, 0], f"head {h}: to a", x="b", y="a", low=0, high=1) for h, pattern in enumerate(inside.attention)]
    for k in inside.keys:
        if (inside.tuned_to == k).any():
            best = np.argmax(inside.explained * (inside.tuned_to == k))
            found.append(HeatMap(inside.neurons[:, :, best], f"a neuron of frequency {k}", x="b", y="a"))
    return found


def claims(setting: Setting, task: Addition, inside: Inside, measures: np.ndarray, decay: Fit, control: Fit) -> dict[str, bool]:
    known, later = decay.first(EXAMPLES, KNOWN), decay.first(OTHERS, UNDERSTOOD)
    others_then = decay.log[decay.log[:, 0] <= known, OTHERS][-1]
    return {
        f"it first learns by heart: {KNOWN:.0%} of the examples before step {setting.known_by}, and then at most {KNOWN_BY_HEART:.0%} of "
        "the others": known < setting.known_by and others_then <= KNOWN_BY_HEART,
        "meanwhile it is worse on the others than guessing": decay.log[:, 2].max() > math.log(task.p),
        f"it understands long after: {UNDERSTOOD:.0%} of the others after more than 8 times as many steps": 8 * known < later < math.inf,
        f"without weight decay it does not: in as many steps less than {NOT_UNDERSTOOD:.0%} of the others": control.log[:, OTHERS].max()
        < NOT_UNDERSTOOD,
        "at most 6 frequencies hold at least 90 % of the logits' variance": len(inside.keys) <= 6 and in_keys(inside) >= 0.9,
        "by these alone it is as good on the others, or better": measures[-1, 1] <= task.losses(inside.logits)[~task.examples].mean(),
        "without these it does not even know its examples: their loss is above half of ln p": measures[-1, 2] > math.log(task.p) / 2,
    }
