"""Compare position encodings at the trained length and at twice that.

Sources: Vaswani et al. 2017, 3.5; Haviv et al. 2022 for none.
"""

import math

from lama.embeddings import SinusoidalPositions
from lama.experiments.report import Options, Report
from lama.experiments.text import fit, heldout, loss_panel, shape
from lama.models.gpt import GPT
from lama.tables import Table

SMALL = "sinusoidal, as small as the embeddings"
ENCODINGS = {"learned": "learned", "sinusoidal": "sinusoidal", SMALL: "sinusoidal", "none": "none"}


def make(kind: str, context_length: int, seed: int | None) -> GPT:
    """A GPT with one of ENCODINGS."""
    model = GPT(shape(positions=ENCODINGS[kind], context_length=context_length), seed)
    if kind == SMALL:  # sines have a mean square of a half
        model.pos_embed = SinusoidalPositions(context_length, model.config.d_model, scale=0.02 * math.sqrt(2))
    return model


def longer(model: GPT, kind: str, context_length: int) -> GPT | None:
    """The same weights at a longer context, if the encoding allows it."""
    if kind == "learned":
        return None
    twin = make(kind, context_length, seed=None)
    twin.embed, twin.blocks, twin.ln_final = model.embed, model.blocks, model.ln_final
    return twin


def run(options: Options) -> Report:
    length, fits, beyond = shape().context_length, {}, {}
    for name in ENCODINGS:
        fits[name] = fit(options, name, make(name, length, options.seed))
        twin = longer(fits[name].model, name, 2 * length)
        if twin is not None:
            beyond[name] = heldout(twin)
    trained = {name: found.heldout for name, found in fits.items()}
    rows = [(name, loss, beyond.get(name, "no such rows")) for name, loss in trained.items()]
    less = trained["none"] > min(trained["learned"], trained["sinusoidal"])
    worse = all(beyond[name] > trained[name] for name in ("sinusoidal", SMALL))
    without_small = min(trained["none"], trained["sinusoidal"])
    return Report(
        [Table(("positions", f"held-out loss at {length} tokens", f"at {2 * length}"), rows)],
        [loss_panel(fits)],
        {
            "without positions the model learns the order from the causal mask, though less": less,
            "sinusoids help if they are no larger than the embeddings": trained[SMALL] < without_small,
            "sinusoids are worse at twice the trained length": worse,
            "learned positions have no rows beyond the trained length": "learned" not in beyond,
        },
    )
