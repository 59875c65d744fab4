"""Count parameters, operations and memory of GPT-2. Source: Kaplan et al. 2020, section 2.1."""

from lama.experiments.report import Options, Report, Table
from lama.models.gpt import GPT, GPT2_CONFIGS, GPTConfig
from lama.models.registry import n_parameters

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def formula(c: GPTConfig) -> int:
    """Parameters: V d + T d in embeddings, 12 d² + 13 d in each block, 2 d in the last norm."""
    d = c.d_model
    return c.vocab_size * d + c.context_length * d + c.n_layers * (12 * d**2 + 13 * d) + 2 * d


def operations(c: GPTConfig) -> tuple[int, int, int]:
    """FLOP for the last token of a full context, forward: in matrices, scores and values, unembedding."""
    return (
        24 * c.d_model**2 * c.n_layers,
        4 * c.context_length * c.d_model * c.n_layers,
        2 * c.vocab_size * c.d_model,
    )


def run(options: Options) -> Report:
    counts = {name: n_parameters(GPT(config, seed=None)) for name, config in GPT2_CONFIGS.items()}
    parameters = [
        (name, counts[name], formula(c), (c.vocab_size + c.context_length) * c.d_model / counts[name])
        for name, c in GPT2_CONFIGS.items()
    ]
    work = []
    for name, c in GPT2_CONFIGS.items():
        blocks, attention, unembedding = (n / 1e6 for n in operations(c))
        cache = 2 * c.n_layers * c.context_length * c.d_model * 4 / 2**20
        work.append((name, blocks, attention, unembedding, 4 * c.d_model, 6 * c.d_model, cache))
    costs = "MFLOP per token: matrices", "scores and values", "unembedding"
    equal = "T where attention costs as much as the MLP", "as all matrices"
    exact = counts == PUBLISHED and all(row[1] == row[2] for row in parameters)
    return Report(
        [
            Table(("model", "parameters", "by formula", "share in embeddings"), parameters),
            Table(("model", *costs, *equal, "KV cache, MiB"), work),
        ],
        claims={"the models have the published numbers of parameters, and so has the formula": exact},
    )
