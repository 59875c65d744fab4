"""Position encodings at the length that was trained and beyond it. Sources: Vaswani et al. 2017, 3.5; Haviv et al. 2022 for none."""

from lama.embeddings import POSITIONS
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import fit, heldout, shape, smooth
from lama.models.gpt import GPT


def longer(model: GPT, context_length: int) -> GPT | None:
    """The same weights for more tokens, if the encoding has places for them."""
    if model.config.positions == "learned":
        return None
    twin = GPT(shape(positions=model.config.positions, context_length=context_length), seed=None)
    twin.embed, twin.blocks, twin.ln_final = model.embed, model.blocks, model.ln_final
    return twin


def run(options: Options) -> Report:
    rows: list[tuple[str, float, float | None]] = []
    curves = []
    for name in POSITIONS:
        trained = fit(options, name, GPT(shape(positions=name), options.seed))
        length = trained.model.config.context_length
        twin = longer(trained.model, 2 * length)
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
            "sinusoids are worse at twice the trained length": beyond["sinusoidal"] > trained_at["sinusoidal"],
            "learned positions have no rows beyond the trained length": "learned" not in beyond,
        },
    )
