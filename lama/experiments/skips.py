"""Compare depths 1 to 8 with and without residual stream and norms. Source: Dong et al. 2021 for the rank."""

from dataclasses import replace

import numpy as np
from tinygrad import Context, Tensor
from tinygrad.nn.state import get_state_dict

from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import fit, frequencies, shape, windows
from lama.interp.record import run_with_cache
from lama.models.gpt import GPT
from lama.training.loss import language_model_loss

DEPTHS = (1, 2, 4, 8)
VARIANTS = {
    "stream and norms": (True, "pre"),
    "stream, no norms": (True, "none"),
    "norms, no stream": (False, "pre"),
    "neither": (False, "none"),
}
"""Name -> (residual, norm)."""


def untrained(depth: int, seed: int, residual: bool, norm: str) -> GPT:
    """A GPT whose blocks' matrices start with variance 1 / d_in.

    With GPT-2's smaller initial weights, the signal would vanish without residual stream and norms.
    """
    model = GPT(replace(shape(), n_layers=depth, residual=residual, norm=norm), seed)
    for name, p in get_state_dict(model).items():
        if name.startswith("blocks.") and len(p.shape) == 2:
            p.assign(p * (int(p.shape[1]) ** -0.5 / p.std())).realize()
    return model


def gradient_at_the_embedding(model: GPT) -> float:
    """The norm of the loss's gradient at the embedding, without the part from the unembedding."""
    inputs, targets = (Tensor(part).realize() for part in windows(n=16))
    positions = get_state_dict(model)["pos_embed.weight"]
    with Context(TRAINING=1):
        (gradient,) = language_model_loss(model, inputs, targets).gradient(positions)
    return float(gradient.square().sum().sqrt().item())


def spread(model: GPT) -> list[float]:
    """‖X − its mean over positions‖ / ‖X‖ after each block: 0 if all positions are equal, rank 1."""
    _, cache = run_with_cache(model, windows(n=16)[0], "blocks.*.resid_post")
    values = cache.layers("resid_post")
    return [float(np.linalg.norm(x - x.mean(1, keepdims=True)) / np.linalg.norm(x)) for x in values]


def run(options: Options) -> Report:
    found, spreads = {}, []
    for name, (residual, norm) in VARIANTS.items():
        for depth in DEPTHS:
            model = untrained(depth, options.seed, residual, norm)
            gradient, by_layer = gradient_at_the_embedding(model), spread(model)
            loss = fit(options, f"{name}, {depth} layers", model).heldout
            found[name, depth] = gradient, by_layer[-1], loss
        spreads.append(Curve(name, range(1, depth + 1), by_layer))
    rows = [(name, depth, *values) for (name, depth), values in found.items()]
    baseline = ("character frequencies", "", "", "", frequencies())

    def curves(i: int) -> list[Curve]:
        return [Curve(name, DEPTHS, [found[name, depth][i] for depth in DEPTHS]) for name in VARIANTS]

    deep, whole, without = DEPTHS[-1], "stream and norms", ("norms, no stream", "neither")
    better = found[whole, deep][2] < found[whole, 1][2]
    worse = all(found[name, deep][2] > found[name, 1][2] for name in without)
    equal = all(found[name, deep][1] < found[name, 1][1] / 2 for name in without)
    title = "gradient at the position embedding, before training"
    collapse = f"spread of the positions, {deep} layers, before training"
    columns = ("model", "layers", "gradient at the positions", "spread of the positions", "held-out loss")
    return Report(
        [Table(columns, [*rows, baseline])],
        [
            Panel(title, "layers", "norm", curves(0), logarithmic="xy"),
            Panel(collapse, "after layer", "share of the norm", spreads),
            Panel("after training", "layers", "held-out loss, nats per character", curves(2)),
        ],
        {
            f"with stream and norms, {deep} layers learn better than 1": better,
            f"without the stream, {deep} layers are worse than 1": worse,
            "without the stream all positions become equal: their spread falls with depth": equal,
        },
    )
