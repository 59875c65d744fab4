"""Where does a transformer know the order of its tokens from, and what does it gain by having no time?"""

import time

import numpy as np
from tinygrad import Tensor

from lama.blocks import Block
from lama.embeddings import sinusoids
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.generation import Decoder
from lama.layers import initialise
from lama.masks import causal_mask
from lama.models.gpt import GPT, GPTConfig

T, D = 24, 32
LENGTHS = (32, 64, 128, 256, 512)


def run(options: Options) -> Report:
    moved = [moves(options.seed, *kind) for kind in ((False, False, 2), (True, False, 2), (False, True, 1), (False, True, 2))]
    timed = [speeds(options.seed, length) for length in LENGTHS]
    tables = [
        Table(("positions", "mask", "layers", "change of the last output when those before it change places"), moved),
        Table(("tokens", "all at once, s", "one by one, s", "ratio", "largest difference of logits", "steps that wait, one by one"), timed),
    ]
    panel = Panel(
        "time for a text",
        "tokens",
        "seconds",
        [Curve("all at once", LENGTHS, [r[1] for r in timed]), Curve("one by one", LENGTHS, [r[2] for r in timed])],
        logarithmic="xy",
    )
    nowhere, positions, mask_1, mask_2 = (row[-1] for row in moved)
    return Report(
        tables,
        [panel],
        {
            "without positions and mask, order makes no difference": nowhere < 1e-5,
            "with positions it does": positions > 1e-3,
            "the causal mask alone tells one layer nothing, two layers something": mask_1 < 1e-5 and mask_2 > 1e-3,
            "all at once and one by one give the same logits": all(row[4] < 1e-4 for row in timed),
        },
    )


def moves(seed: int, positions: bool, causal: bool, layers: int) -> tuple[str, str, int, float]:
    """How far the last position's output moves when the others are put in another order."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, T, D)).astype(np.float32)
    order = [*rng.permutation(T - 1), T - 1]
    blocks = [Block(D, 4, 4 * D) for _ in range(layers)]
    for i, block in enumerate(blocks):
        initialise(block, seed + i, std=0.2)

    def last(x: np.ndarray) -> np.ndarray:
        stream = Tensor(x + sinusoids(T, D) if positions else x)
        for block in blocks:
            stream = block(stream, causal_mask(T, T) if causal else None)
        return stream.numpy()[0, -1]

    change = float(np.abs(last(x) - last(x[:, order])).max())
    return "sinusoidal" if positions else "none", "causal" if causal else "none", layers, change


def speeds(seed: int, n: int) -> tuple[float, ...]:
    """A text of n tokens through a GPT at once, and through the same GPT token by token with its KV cache."""
    model = GPT(GPTConfig(97, n, d_model=128, n_layers=4, n_heads=4), seed)
    tokens = np.random.default_rng(seed).integers(97, size=(1, n))
    decoder = Decoder(model)

    def at_once() -> np.ndarray:
        return decoder.prefill(tokens)

    def one_by_one() -> np.ndarray:
        logits = decoder.prefill(tokens[:, :1])
        for i in range(1, n):
            logits = decoder.decode(tokens[:, i])
        return logits

    seconds, logits = [], []
    for way in (at_once, one_by_one):
        way()  # the first call compiles
        began = time.perf_counter()
        logits.append(way())
        seconds.append(time.perf_counter() - began)
    return n, *seconds, seconds[1] / seconds[0], float(np.abs(logits[0] - logits[1]).max()), n
