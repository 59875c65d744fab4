"""Has every layer weights of its own for a reason? One layer's weights used by all, against own ones. Source: Lan et al. 2020 (ALBERT)."""

from itertools import combinations

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_parameters, get_state_dict

from lama.dropout import Dropout, no_dropout
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.experiments.text import Fit, fit, shape, smooth
from lama.models.gpt import GPT

LAYERS = 4


class Shared:
    """A GPT of one block, which runs `times` times."""

    def __init__(self, times: int, seed: int):
        self.gpt, self.times = GPT(shape(n_layers=1), seed), times
        self.config = self.gpt.config

    def __call__(self, tokens: Tensor, dropout: Dropout = no_dropout) -> Tensor:
        x, mask = self.gpt.embedded(tokens)
        for _ in range(self.times):
            x = self.gpt.blocks[0](x, mask)
        return self.gpt.logits(self.gpt.normalised(x))


def alike(model: GPT, of: str) -> float:
    """The mean cosine between the matrices `of` two different layers."""
    weights = [get_state_dict(block)[of].numpy().reshape(-1) for block in model.blocks]
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(weights, 2)]))


def run(options: Options) -> Report:
    fits: dict[str, Fit] = {
        f"{LAYERS} layers of their own": fit(options, "own", GPT(shape(n_layers=LAYERS), options.seed)),
        f"one layer, {LAYERS} times": fit(options, "shared", Shared(LAYERS, options.seed)),
        "one layer, once": fit(options, "once", GPT(shape(n_layers=1), options.seed)),
    }
    rows = [(name, sum(int(p.numel()) for p in get_parameters(f.model)), f.heldout) for name, f in fits.items()]
    own, shared = list(fits.values())[:2]
    cosines = [(name, alike(own.model, name)) for name in ("attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight")]
    return Report(
        [Table(("model", "parameters", "held-out loss"), rows), Table(("matrix", "mean cosine between two layers"), cosines)],
        [Panel("training loss", "step", "nats per character", [Curve(n, range(len(f.losses)), smooth(f.losses)) for n, f in fits.items()])],
        {
            "layers with weights of their own are better than one used by all": own.heldout < shared.heldout,
            "they learn different things: no matrix is like the same one of another layer (cosine below 0.2)": all(
                abs(cosine) < 0.2 for _, cosine in cosines
            ),
        },
    )
