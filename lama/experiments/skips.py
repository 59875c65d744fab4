"""Why does every sub-layer add to a stream, and why the norms? Depths 1 to 8 without them. Source: Dong et al. 2021 for the rank."""

from typing import Any

import numpy as np
from tinygrad import Context
from tinygrad.nn.state import get_state_dict

from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import batch, fit, frequencies, shape
from lama.models.gpt import GPT
from lama.taps import Recorder
from lama.training.loss import language_model_loss

DEPTHS = (1, 2, 4, 8)
KINDS = {
    "stream and norms": {"residual": True, "norm": "pre"},
    "stream, no norms": {"residual": True, "norm": "none"},
    "norms, no stream": {"residual": False, "norm": "pre"},
    "neither": {"residual": False, "norm": "none"},
}


def untrained(depth: int, seed: int, kind: dict[str, Any]) -> GPT:
    """A GPT whose matrices in the blocks start with variance 1 / d_in.

    GPT-2's are smaller, as what they write is added to something: one after the other, without norms, they would leave nothing.
    """
    model = GPT(shape(n_layers=depth, **kind), seed)
    for name, p in get_state_dict(model).items():
        if name.startswith("blocks.") and len(p.shape) == 2:
            p.assign(p * (int(p.shape[1]) ** -0.5 / p.std())).realize()
    return model


def gradient_at_the_embedding(model: GPT) -> float:
    """The norm of the loss's gradient in the token embedding, of the part that comes through the blocks."""
    inputs, targets = batch(16)
    with Context(TRAINING=1):
        (gradient,) = language_model_loss(model, inputs, targets).gradient(get_state_dict(model)["pos_embed.weight"])
    return float(gradient.square().sum().sqrt().item())


def spread(model: GPT) -> list[float]:
    """After each block, ‖X − its mean over positions‖ / ‖X‖: 0 where all positions say the same, rank 1."""
    record = Recorder("blocks.*.resid_post")
    model(batch(16)[0], tap=record)
    values = [record[f"blocks.{i}.resid_post"].numpy() for i in range(len(model.blocks))]
    return [float(np.linalg.norm(x - x.mean(1, keepdims=True)) / np.linalg.norm(x)) for x in values]


def run(options: Options) -> Report:
    rows: list[tuple[Any, ...]] = []
    spreads = []
    for name, kind in KINDS.items():
        for depth in DEPTHS:
            model = untrained(depth, options.seed, kind)
            gradient, spread_here = gradient_at_the_embedding(model), spread(model)
            rows.append((name, depth, gradient, spread_here[-1], fit(options, f"{name}, {depth} layers", model).heldout))
        spreads.append(Curve(name, range(1, depth + 1), spread_here))
    found = {(name, depth): row for name, depth, *row in rows}
    rows.append(("the characters' frequencies", "", "", "", frequencies()))

    def curves(i: int) -> list[Curve]:
        return [Curve(name, DEPTHS, [found[name, depth][i] for depth in DEPTHS]) for name in KINDS]

    deep, whole = DEPTHS[-1], "stream and norms"
    return Report(
        [Table(("model", "layers", "gradient at the positions", "spread of the positions", "held-out loss"), rows)],
        [
            Panel("gradient at the position embedding, before training", "layers", "norm", curves(0), logarithmic="xy"),
            Panel(f"spread of the positions, {deep} layers, before training", "after layer", "share of the norm", spreads),
            Panel("after training", "layers", "held-out loss, nats per character", curves(2)),
        ],
        {
            f"with stream and norms, {deep} layers learn better than 1": found[whole, deep][2] < found[whole, 1][2],
            f"without the stream, {deep} layers are worse than 1": all(
                found[name, deep][2] > found[name, 1][2] for name in ("norms, no stream", "neither")
            ),
            "without the stream all positions come to say the same: their spread falls with depth": all(
                found[name, deep][1] < found[name, 1][1] / 2 for name in ("norms, no stream", "neither")
            ),
        },
    )
