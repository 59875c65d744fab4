"""Compare one vocabulary matrix for embedding and unembedding with two. Source: Press & Wolf 2017."""

from dataclasses import replace

from lama.experiments.report import Options, Report, Table
from lama.experiments.text import fit, loss_panel, shape
from lama.models.gpt import GPT
from lama.models.registry import n_parameters


def run(options: Options) -> Report:
    models = {
        name: GPT(replace(shape(), tied=tied, n_layers=layers), options.seed)
        for name, tied, layers in (
            ("tied, 2 layers", True, 2),
            ("untied, 2 layers", False, 2),
            ("tied, no layers, only the norm", True, 0),
            ("untied, no layers, only the norm", False, 0),
        )
    }
    fits = {name: fit(options, name, model) for name, model in models.items()}
    rows = [(name, n_parameters(model), fits[name].heldout) for name, model in models.items()]
    tied, untied, bare_tied, bare_untied = (row[2] for row in rows)
    gain = bare_tied - bare_untied
    little, V, d = tied - untied < 0.1 * gain + 0.05, shape().vocab_size, shape().d_model
    return Report(
        [Table(("model", "parameters", "held-out loss"), rows)],
        [loss_panel(fits)],
        {
            f"tying saves vocabulary x d_model = {V} x {d} parameters": rows[1][1] - rows[0][1] == V * d,
            "without layers one matrix cannot map a token to a different one: untied is better": gain > 0.05,
            "with layers the difference is a tenth of that or less, or tied is better": little,
        },
    )
