"""Norms before or after each sub-layer, with and without warm-up. Source: Xiong et al. 2020."""

from typing import Any

from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import STEPS, fit, frequencies, shape, smooth
from lama.models.gpt import GPT

LAYERS = 6


def run(options: Options) -> Report:
    steps = options.steps or STEPS
    fits = {
        (norm, warmup): fit(options, f"{norm}, warm-up {warmup}", GPT(shape(norm=norm, n_layers=LAYERS), options.seed), warmup=warmup)
        for norm in ("pre", "post")
        for warmup in (0, steps // 4)
    }
    rows: list[tuple[Any, ...]] = [(f"{norm}-norm", warmup, f.losses[steps // 4], f.heldout) for (norm, warmup), f in fits.items()]
    rows.append(("the characters' frequencies", "", "", frequencies()))
    curves = [Curve(f"{norm}-norm, warm-up {warmup}", range(steps), smooth(f.losses)) for (norm, warmup), f in fits.items()]
    gain = {norm: fits[norm, 0].heldout - fits[norm, steps // 4].heldout for norm in ("pre", "post")}
    return Report(
        [Table((f"{LAYERS} layers", "warm-up steps", f"training loss at step {steps // 4}", "held-out loss"), rows)],
        [Panel("training loss", "step", "nats per character", curves)],
        {
            "with its norms before, the model does without warm-up": abs(gain["pre"]) < 0.1,
            "with its norms after, it does not: there warm-up gains more": gain["post"] > gain["pre"],
        },
    )
