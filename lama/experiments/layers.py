"""Compare separate weights for every layer with shared weights. Source: Lan et al. 2020 (ALBERT)."""

from dataclasses import replace
from itertools import combinations

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.experiments.report import Options, Report, Table
from lama.experiments.text import fit, loss_panel, shape
from lama.masks import Causal
from lama.models.gpt import GPT
from lama.models.registry import n_parameters

LAYERS = 4


class Shared:
    """A GPT with one block that runs `times` times."""

    def __init__(self, times: int, seed: int):
        self.gpt, self.times = GPT(replace(shape(), n_layers=1), seed), times

    def __call__(self, tokens: Tensor, dropout: object = None) -> Tensor:
        x = self.gpt.embedded(tokens)
        for _ in range(self.times):
            x = self.gpt.blocks[0](x, Causal())
        return self.gpt.logits(self.gpt.normalised(x))


def alike(model: GPT, of: str) -> float:
    """The mean cosine between the matrices `of` two different layers."""
    weights = [get_state_dict(block)[of].numpy().reshape(-1) for block in model.blocks]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(weights, 2)]
    return float(np.mean(cosines))


def run(options: Options) -> Report:
    own, shared = GPT(replace(shape(), n_layers=LAYERS), options.seed), Shared(LAYERS, options.seed)
    models: dict[str, tuple[str, GPT | Shared]] = {
        f"{LAYERS} layers, separate weights": ("own", own),
        f"one layer, {LAYERS} times": ("shared", shared),
        "one layer, once": ("once", GPT(replace(shape(), n_layers=1), options.seed)),
    }
    fits = {name: fit(options, label, model) for name, (label, model) in models.items()}
    rows = [(name, n_parameters(model), fits[name].heldout) for name, (_, model) in models.items()]
    matrices = ("attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight")
    cosines = [(name, alike(own, name)) for name in matrices]
    different = all(abs(cosine) < 0.2 for _, cosine in cosines)
    return Report(
        [
            Table(("model", "parameters", "held-out loss"), rows),
            Table(("matrix", "mean cosine between two layers"), cosines),
        ],
        [loss_panel(fits)],
        {
            "separate weights for every layer are better than shared ones": rows[0][2] < rows[1][2],
            "no matrix is like that of another layer: the cosine is below 0.2": different,
        },
    )
