"""One vocabulary matrix for embedding and unembedding, or two? Source: Press & Wolf 2017."""

from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import fit, shape, smooth
from lama.models.gpt import GPT


def run(options: Options) -> Report:
    fits = {
        name: fit(options, name, GPT(shape(tied=tied, n_layers=layers), options.seed))
        for name, tied, layers in (
            ("tied, 2 layers", True, 2),
            ("untied, 2 layers", False, 2),
            ("tied, no layer but the norm", True, 0),
            ("untied, no layer but the norm", False, 0),
        )
    }
    rows = [(name, f.model.n_parameters(), f.heldout) for name, f in fits.items()]
    saved = rows[1][1] - rows[0][1]
    return Report(
        [Table(("model", "parameters", "held-out loss"), rows)],
        [Panel("training loss", "step", "nats per character", [Curve(n, range(len(f.losses)), smooth(f.losses)) for n, f in fits.items()])],
        {
            f"tying saves vocabulary x d_model = {shape().vocab_size} x {shape().d_model} parameters": saved
            == shape().vocab_size * shape().d_model,
            "without layers, what follows must differ from what came before, and one matrix cannot say so: untied is better": rows[3][2]
            < rows[2][2] - 0.05,
            "with layers the difference is a tenth of that or less, or tied is the better one": rows[0][2] - rows[1][2]
            < 0.1 * (rows[2][2] - rows[3][2]) + 0.05,
        },
    )
