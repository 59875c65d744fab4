"""Test how a transformer knows the order of tokens, and compare one pass with token-by-token decoding."""

import time
from functools import partial

import numpy as np
from tinygrad import Tensor

from lama.embeddings import sinusoids
from lama.experiments.report import Options, Panel, Report, Table, column_curve
from lama.generation import Runner
from lama.layers import initialise
from lama.masks import causal_mask
from lama.models.gpt import GPT, GPTConfig, make_block
from lama.shapes import Array

T, D = 24, 32
LENGTHS = (32, 64, 128, 256, 512)


def run(options: Options) -> Report:
    kinds = ((False, False, 2), (True, False, 2), (False, True, 1), (False, True, 2))
    moved = [moves(options.seed, *kind) for kind in kinds]
    timed = [speeds(options.seed, length) for length in LENGTHS]
    change = "change of the last output when the tokens before it are permuted"
    times = ("tokens", "one pass, s", "token by token, s", "ratio")
    curves = [column_curve("one pass", timed, 1), column_curve("token by token", timed, 2)]
    nowhere, positions, mask_1, mask_2 = (row[-1] for row in moved)
    mask_tells = mask_1 < 1e-5 and mask_2 > 1e-3
    return Report(
        [
            Table(("positions", "mask", "layers", change), moved),
            Table((*times, "largest difference of logits", "sequential steps, token by token"), timed),
        ],
        [Panel("time for a text", "tokens", "seconds", curves, logarithmic="xy")],
        {
            "without positions and mask, order makes no difference": nowhere < 1e-5,
            "with positions it does": positions > 1e-3,
            "the causal mask alone shows the order to two layers, but not to one": mask_tells,
            "one pass and token by token give the same logits": all(row[4] < 1e-4 for row in timed),
        },
    )


def moves(seed: int, positions: bool, causal: bool, layers: int) -> tuple[str, str, int, float]:
    """How much the last position's output changes when the other tokens are permuted."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, T, D)).astype(np.float32)
    order = [*rng.permutation(T - 1), T - 1]
    shape = GPTConfig(d_model=D, n_heads=4)
    blocks = [make_block(shape, layer) for layer in range(layers)]
    for i, block in enumerate(blocks):
        initialise(block, seed + i, std=0.2)

    def last(x: Array) -> Array:
        stream = Tensor(x + sinusoids(T, D) if positions else x)
        for block in blocks:
            stream = block(stream, causal_mask(T, T) if causal else None)
        return stream.numpy()[0, -1]

    change = float(np.abs(last(x) - last(x[:, order])).max())
    return "sinusoidal" if positions else "none", "causal" if causal else "none", layers, change


def speeds(seed: int, n: int) -> tuple[float, ...]:
    """Time a text of n tokens in one pass, and token by token with the KV cache."""
    model = GPT(GPTConfig(97, n, d_model=128, n_layers=4, n_heads=4), seed)
    tokens = np.random.default_rng(seed).integers(97, size=(1, n))
    runner = Runner(model)

    def one_by_one() -> Array:
        logits = runner.prefill(tokens[:, :1])
        for i in range(1, n):
            logits = runner.decode(tokens[:, i])
        return logits

    seconds, logits = [], []
    for way in (partial(runner.prefill, tokens), one_by_one):
        way()  # the first call compiles
        began = time.perf_counter()
        logits.append(way())
        seconds.append(time.perf_counter() - began)
    return n, *seconds, seconds[1] / seconds[0], float(np.abs(logits[0] - logits[1]).max()), n
