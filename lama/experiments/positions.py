"""Compare position encodings, also at twice the length. Sources: Vaswani et al. 2017; Haviv et al. 2022."""

import math
from dataclasses import replace

from lama.embeddings import SinusoidalPositions
from lama.experiments.report import Options, Report, Table
from lama.experiments.text import CONTEXT, fit, heldout, loss_panel, shape
from lama.models.gpt import GPT

SMALL = "sinusoidal, as small as the embeddings"
ENCODINGS = {"learned": "learned", "sinusoidal": "sinusoidal", SMALL: "sinusoidal", "none": "none"}


def make(kind: str, context_length: int, seed: int | None) -> GPT:
    """A GPT with one of ENCODINGS."""
    model = GPT(replace(shape(), positions=ENCODINGS[kind], context_length=context_length), seed)
    if kind == SMALL:  # sines have a mean square of a half
        model.pos_embed = SinusoidalPositions(context_length, model.config.d_model, scale=0.02 * math.sqrt(2))
    return model


def run(options: Options) -> Report:
    fits, beyond = {}, {}
    for name in ENCODINGS:
        model = make(name, CONTEXT, options.seed)
        fits[name] = fit(options, name, model)
        if name != "learned":  # the same weights at twice the length
            twin = make(name, 2 * CONTEXT, seed=None)
            twin.embed, twin.blocks, twin.ln_final = model.embed, model.blocks, model.ln_final
            beyond[name] = heldout(twin, 2 * CONTEXT)
    trained = {name: found.heldout for name, found in fits.items()}
    rows = [(name, loss, beyond.get(name, "undefined")) for name, loss in trained.items()]
    less = trained["none"] > min(trained["learned"], trained["sinusoidal"])
    worse = all(beyond[name] > trained[name] for name in ("sinusoidal", SMALL))
    without_small = min(trained["none"], trained["sinusoidal"])
    return Report(
        [Table(("positions", f"held-out loss at {CONTEXT} tokens", f"at {2 * CONTEXT}"), rows)],
        [loss_panel(fits)],
        {
            "without positions the model learns the order from the causal mask, though less": less,
            "sinusoids help if they are no larger than the embeddings": trained[SMALL] < without_small,
            "sinusoids are worse at twice the trained length": worse,
            "learned positions have no rows beyond the trained length": "learned" not in beyond,
        },
    )
