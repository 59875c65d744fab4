"""One number that chooses most settings of a GPT: its parameters, or its blocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lama.errors import UsageError, quoted
from lama.training.settings.gpt import RunConfig

CHOSEN = (
    *("n_layers", "d_model", "n_heads", "d_mlp", "learning_rate", "embedding_learning_rate"),
    *("weight_decay", "batch_size", "accumulation", "steps", "warmup"),
)
"""The settings that `scaled` chooses."""
RATIO = 12.0
REFERENCE = 12 * 12 * 768**2 + 32_768 * 768  # N of nanochat's model of 12 blocks, as `scaled` counts it
REFERENCE_BATCH = 2**19  # tokens of its batch
POWER = 0.383  # a batch's tokens are proportional to the run's tokens to this power
LEAST_STEPS = 180  # for fewer the rule was not measured; its batches are then too large to learn much
PART = 2**14  # the most tokens in a part of a batch: activations need memory
LEAST_RATE = 1e-4  # with adamw, for larger models than Kaplan et al. trained
WIDTH = 64  # numbers of the residual stream for each block


@dataclass(frozen=True)
class Scale:
    """The number of a GPT's parameters, or of its blocks, and the training tokens for each parameter.

    Raises UsageError for a number out of range, and unless exactly one of `size` and `depth` is given.
    """

    size: str | None = None
    """Parameters, such as 10M."""
    depth: int | None = None
    ratio: float = RATIO

    def __post_init__(self) -> None:
        if (self.size is None) == (self.depth is None):
            raise UsageError("exactly one of --size and --depth must be given")
        if self.size is not None:
            parse_size(self.size)
        if self.depth is not None and not 1 <= self.depth <= 96:
            raise UsageError(f"depth must be from 1 to 96; got {self.depth}")
        if not 0 < self.ratio <= 1e6:
            raise UsageError(f"ratio must be above 0 and at most 1,000,000; got {self.ratio}")

    def __str__(self) -> str:
        return f"depth {self.depth}" if self.size is None else f"{self.size} parameters"


def scaled(scale: Scale, given: RunConfig, names: Mapping[str, object], vocab_size: int) -> dict[str, object]:
    """The settings of CHOSEN; those in `names` keep the value of `given`, and the others follow from them.

    The width is about 64 times the depth; heads are 64 wide (32 in narrow models). A run has ratio · N
    tokens, where N counts the blocks' matrices and the output layer. The reference is nanochat's model of 12
    blocks. A batch has 2¹⁹ · (tokens / the reference's tokens)^0.383 tokens, rounded to a power of 2, or
    fewer, so that a run has LEAST_STEPS. Source: nanochat, scripts/base_train.py, after Bergsma et al. 2025.

    With muon, the rate of matrices is 0.02 · √(the reference's steps / steps), at most 0.07, the value for
    180 steps. For the reference's tokens this is nanochat's rate; the best rate of modern-char-cpu is 0.06.
    Source of the root: Schaipp et al. 2025. rate · decay · steps is that of the reference, so that weights
    decay over the same share of a run. With adamw, the rate is 0.003239 − 0.0001395 ln(N), at least
    LEAST_RATE. Source: Kaplan et al. 2020, eq. D.1. Raises UsageError if the vocabulary alone is over the
    budget.
    """
    if scale.size is None:
        n_layers, d_model = scale.depth or 1, WIDTH * (scale.depth or 1)
    else:
        n_layers, d_model = _shape(parse_size(scale.size), given, vocab_size)
    n_layers = given.n_layers if "n_layers" in names else n_layers
    d_model = given.d_model if "d_model" in names else d_model
    n = 12 * n_layers * d_model**2 + vocab_size * d_model
    longer = scale.ratio * n / (RATIO * REFERENCE)
    context, tokens = given.context_length, scale.ratio * n
    largest = math.floor(math.log2(tokens / LEAST_STEPS / context))
    power = min(round(math.log2(REFERENCE_BATCH * longer**POWER / context)), largest)
    windows = given.batch_size if "batch_size" in names else 2 ** max(2, power)
    steps = given.steps if "steps" in names else max(1, round(tokens / (windows * context)))
    parts = math.ceil(math.log2(windows * context / PART))  # as a power of 2, which divides the batch
    rate, decay, embedding = max(LEAST_RATE, 0.003239 - 0.0001395 * math.log(n)), 0.1, 0.0
    if given.optimizer == "muon":
        factor = math.sqrt(RATIO * REFERENCE / REFERENCE_BATCH / max(steps, LEAST_STEPS))
        rate, decay = 0.002 * factor, 0.1 * factor
        if given.initial_weights == "width" and not given.tied:  # embeddings are as large as the stream
            embedding = 10 * rate
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": d_model // (64 if d_model >= 512 else 32),
        "d_mlp": 32 * round(d_model / 12) if given.gated else 4 * d_model,
        "learning_rate": float(f"{rate:.2g}"),
        "embedding_learning_rate": float(f"{embedding:.2g}"),
        "weight_decay": float(f"{decay:.2g}"),
        "batch_size": windows,
        "accumulation": 1 if "batch_size" in names else min(windows, 2 ** max(0, parts)),
        "steps": steps,
        "warmup": min(40, steps // 10),
    } | {name: getattr(given, name) for name in CHOSEN if name in names}


def _shape(parameters: float, given: RunConfig, vocab_size: int) -> tuple[int, int]:
    """The depth and the width of a model with about this number of parameters. Raises UsageError."""
    rows = (2 - given.tied) * vocab_size + given.context_length * (given.positions == "learned")
    best: tuple[float, int, int, int] | None = None
    for n_layers in range(1, 97):
        for d_model in range(32, 16384, 32):
            total = 12 * n_layers * d_model**2 + rows * d_model
            if total > 2 * parameters:
                break
            if d_model >= 512 and d_model % 64:
                continue
            cost = abs(math.log(total / parameters)) + 0.2 * abs(math.log(d_model / (WIDTH * n_layers)))
            if best is None or cost < best[0]:
                best = cost, n_layers, d_model, total
    if best is None or not 0.5 < best[3] / parameters < 2:
        raise UsageError(
            f"size must leave room for the embeddings; got {parameters:,.0f} parameters for "
            f"{vocab_size:,} tokens. Choose a smaller vocabulary or a larger size"
        )
    return best[1], best[2]


def parse_size(text: str) -> float:
    """`10M` -> 10,000,000; the unit is K, M, B or none. Raises UsageError."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    unit = text[-1:].upper()
    try:
        value = float(text[:-1] if unit in units else text) * units.get(unit, 1)
    except ValueError:
        value = 0.0
    if not 1e3 <= value <= 1e11:
        raise UsageError(f"size must be a number of parameters such as 800K, 10M or 1.5B; got {quoted(text)}")
    return value
