"""Compare norms before and after each sub-layer, with and without warm-up. Source: Xiong et al. 2020."""

from lama.experiments.report import Curve, Options, Panel, Report
from lama.experiments.text import STEPS, fit, frequencies, shape, smooth
from lama.models.gpt import GPT
from lama.tables import Table

LAYERS = 6


def run(options: Options) -> Report:
    steps = options.steps or STEPS
    fits, rows, curves = {}, [], []
    for norm in ("pre", "post"):
        for warmup in (0, steps // 4):
            label, model = f"{norm}, warm-up {warmup}", GPT(shape(norm=norm, n_layers=LAYERS), options.seed)
            found = fits[norm, warmup] = fit(options, label, model, warmup=warmup)
            rows.append((f"{norm}-norm", warmup, found.losses[steps // 4], found.heldout))
            curves.append(Curve(f"{norm}-norm, warm-up {warmup}", range(steps), smooth(found.losses)))
    baseline = ("character frequencies", "", "", frequencies())
    gain = {norm: fits[norm, 0].heldout - fits[norm, steps // 4].heldout for norm in ("pre", "post")}
    columns = ("warm-up steps", f"training loss at step {steps // 4}", "held-out loss")
    return Report(
        [Table((f"{LAYERS} layers", *columns), [*rows, baseline])],
        [Panel("training loss", "step", "nats per character", curves)],
        {
            "with norms before each sub-layer, no warm-up is needed": abs(gain["pre"]) < 0.1,
            "with norms after each sub-layer, warm-up gains more": gain["post"] > gain["pre"],
        },
    )
