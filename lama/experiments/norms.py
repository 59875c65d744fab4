"""Compare norms before and after each sub-layer, with and without warm-up. Source: Xiong et al. 2020."""

from dataclasses import replace

from lama.experiments.report import Options, Report, Table
from lama.experiments.text import STEPS, fit, frequencies, loss_panel, shape
from lama.models.gpt import GPT

LAYERS = 6


def run(options: Options) -> Report:
    steps = options.steps or STEPS
    fits = {}
    for norm in ("pre", "post"):
        for warmup in (0, steps // 4):
            model = GPT(replace(shape(), norm=norm, n_layers=LAYERS), options.seed)
            fits[norm, warmup] = fit(options, f"{norm}, warm-up {warmup}", model, warmup)
    rows = [(f"{norm}-norm", n, found.losses[steps // 4], found.heldout) for (norm, n), found in fits.items()]
    baseline = ("character frequencies", "", "", frequencies())
    gain = {norm: fits[norm, 0].heldout - fits[norm, steps // 4].heldout for norm in ("pre", "post")}
    columns = ("warm-up steps", f"training loss at step {steps // 4}", "held-out loss")
    return Report(
        [Table((f"{LAYERS} layers", *columns), [*rows, baseline])],
        [loss_panel({f"{norm}-norm, warm-up {n}": found for (norm, n), found in fits.items()})],
        {
            "with norms before each sub-layer, no warm-up is needed": abs(gain["pre"]) < 0.1,
            "with norms after each sub-layer, warm-up gains more": gain["post"] > gain["pre"],
        },
    )
