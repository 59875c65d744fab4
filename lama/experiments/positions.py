"""Position encodings at the length that was trained and beyond it. Sources: Vaswani et al. 2017, 3.5; Haviv et al. 2022 for none."""

import math

from lama.embeddings import SinusoidalPositions
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import fit, heldout, shape, smooth
from lama.models.gpt import GPT

SMALL = "sinusoidal, as small as the embeddings"
KINDS = {"learned": "learned", "sinusoidal": "sinusoidal", SMALL: "sinusoidal", "none": "none"}


def make(kind: str, context_length: int, seed: int | None) -> GPT:
    """A GPT with one of KINDS."""
    model = GPT(shape(positions=KINDS[kind], context_length=context_length), seed)
    if kind == SMALL and isinstance(model.pos_embed, SinusoidalPositions):
        model.pos_embed.table = model.pos_embed.table * (0.02 * math.sqrt(2))  # sines have a mean square of a half
    return model


def longer(model: GPT, kind: str, context_length: int) -> GPT | None:
    """The same weights for more tokens, if the encoding has places for them."""
    if kind == "learned":
        return None
    twin = make(kind, context_length, seed=None)
    twin.embed, twin.blocks, twin.ln_final = model.embed, model.blocks, model.ln_final
    return twin


def run(options: Options) -> Report:
    rows: list[tuple[str, float, float | None]] = []
    curves = []
    length = shape().context_length
    for name in KINDS:
        trained = fit(options, name, make(name, length, options.seed))
        twin = longer(trained.model, name, 2 * length)
        rows.append((name, trained.heldout, None if twin is None else heldout(twin)))
        curves.append(Curve(name, range(len(trained.losses)), smooth(trained.losses)))
    trained_at = {name: loss for name, loss, _ in rows}
    beyond = {name: loss for name, _, loss in rows if loss is not None}
    shown = [(name, loss, "no such rows" if twice is None else twice) for name, loss, twice in rows]
    return Report(
        [Table(("positions", f"held-out loss at {length} tokens", f"at {2 * length}"), shown)],
        [Panel("training loss", "step", "nats per character", curves)],
        {
            "without positions the causal mask alone tells enough of the order to learn, though less": trained_at["none"]
            > min(trained_at["learned"], trained_at["sinusoidal"]),
            "sinusoids are of use once they are no larger than what they are added to": trained_at[SMALL]
            < min(trained_at["none"], trained_at["sinusoidal"]),
            "sinusoids are worse at twice the trained length": all(beyond[name] > trained_at[name] for name in ("sinusoidal", SMALL)),
            "learned positions have no rows beyond the trained length": "learned" not in beyond,
        },
    )
