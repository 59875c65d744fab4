"""What the tests of the blocks share: random parameters, and the formulas in plain numpy (float64)."""

import math
from typing import Any

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.attention import MultiHeadAttention, make_similarity
from lama.blocks import Block, make_mlp, make_norm
from lama.kernels.tiles import in_tiles, tiles_of, write_tiles
from lama.runtime.buffers import host_array
from lama.training.loop import Step
from lama.training.session import Session
from lama.training.settings import read_settings, run_config
from lama.training.settings.gpt import MODEL_SETTINGS

Arrays = dict[str, np.ndarray]

# One small model and one batch for all tests: every new shape costs a compilation.
SMALL = {"vocab_size": 11, "context_length": 13, "d_model": 6, "n_layers": 2, "n_heads": 3, "d_mlp": 17}
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]], np.int32)


# One text and one shape for all tests of whole runs, for the same reason.
CATS = "the cat sat on the mat, and the dog sat on the cat.\n" * 150
RUN: dict[str, Any] = {
    "context_length": 19,
    "d_model": 22,
    "n_layers": 1,
    "n_heads": 2,
    "batch_size": 6,
    "accumulation": 2,
    "dropout": 0.1,
    "learning_rate": 1e-2,
    "evaluation_tokens": 200,
}
RUN_FLAGS = [word for name, value in RUN.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def preset_shape(name: str) -> dict[str, Any]:
    """The fields of GPTConfig that a preset of lama train gives, with two blocks."""
    config = run_config(read_settings(name))
    return {field: getattr(config, field) for field in MODEL_SETTINGS} | {"n_layers": 2}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def tiled(matrix: Tensor) -> Tensor:
    """A copy of a realised matrix of half precision in tiles."""
    copy = in_tiles(*map(int, matrix.shape), matrix.dtype)
    write_tiles(host_array(tiles_of(copy)), 0, host_array(matrix))
    return copy


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, ties to even, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(float)


def fill(module: Any, seed: int = 0) -> Arrays:
    """Draw every parameter from N(0, 0.25), biases and norm weights too, and return them by name."""
    values = {
        name: normal(*p.shape, seed=seed + i) / 2
        for i, (name, p) in enumerate(get_state_dict(module).items())
    }
    for name, parameter in get_state_dict(module).items():
        parameter.assign(Tensor(values[name])).realize()
    return values


def under(prefix: str, parameters: Arrays) -> Arrays:
    """The parameters whose names start with `prefix.`, without it."""
    return {
        name.removeprefix(prefix + "."): value
        for name, value in parameters.items()
        if name.startswith(prefix + ".")
    }


def linear(x: np.ndarray, p: Arrays) -> np.ndarray:
    return x @ p["weight"].T.astype(float) + p.get("bias", 0)


def layer_norm(x: np.ndarray, p: Arrays, epsilon: float = 1e-5) -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return normal * p["weight"] + p.get("bias", 0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def mlp(x: np.ndarray, p: Arrays, activation: str = "gelu_new") -> np.ndarray:
    return linear(ACTIVATIONS[activation](linear(x, under("up", p))), under("down", p))


def score(name: str, q: np.ndarray, k: np.ndarray, p: Arrays, head: int) -> np.ndarray:
    """(T, d), (S, d) -> (T, S), one head, one pair of positions at a time."""
    formulas = {
        "dot": lambda a, b: a @ b,
        "scaled_dot": lambda a, b: a @ b / math.sqrt(len(a)),
        "general": lambda a, b: a @ p["weight"][head] @ b,
        "additive": lambda a, b: p["query_weight"][head, :, 0] @ a + p["key_weight"][head, :, 0] @ b,
    }
    return np.array([[formulas[name](a, b) for b in k] for a in q])


def multi_head(
    x: np.ndarray,
    p: Arrays,
    n_heads: int,
    mask: np.ndarray | None = None,
    memory: np.ndarray | None = None,
    similarity: str = "scaled_dot",
) -> np.ndarray:
    """(B, T, d_model) -> (B, T, d_model), row by row and head by head; mask (T, S), True where a query may
    look.
    """
    memory = x if memory is None else memory
    d_model = x.shape[-1]
    d_head = d_model // n_heads
    w, b = p["qkv.weight"], p["qkv.bias"]
    rows = []
    for target, source in zip(x, memory, strict=True):
        z = []
        for h in range(n_heads):
            part = [slice(i * d_model + h * d_head, i * d_model + (h + 1) * d_head) for i in range(3)]
            q, k, v = (t @ w[s].T + b[s] for t, s in zip((target, source, source), part, strict=True))
            scores = score(similarity, q, k, under("similarity", p), h)
            z.append(softmax(scores if mask is None else np.where(mask, scores, -np.inf)) @ v)
        rows.append(np.concatenate(z, -1))
    return linear(np.stack(rows), under("out", p))


def block(
    d_model: int,
    n_heads: int,
    d_mlp: int,
    bias: bool = True,
    activation: str = "gelu_new",
    norm: str = "pre",
    similarity: str = "scaled_dot",
    cross: bool = False,
    **options: Any,
) -> Block:
    """A block of parts of these sizes."""

    def attention() -> MultiHeadAttention:
        return MultiHeadAttention(
            d_model, n_heads, bias, make_similarity(similarity, n_heads, d_model // n_heads)
        )

    norms = [make_norm(d_model, bias, order=norm) for _ in range(3)]
    return Block(
        attention(),
        make_mlp(d_model, d_mlp, bias, activation),
        norms[0],
        norms[1] if d_mlp else None,
        norm,
        attention() if cross else None,
        norms[2] if cross else None,
        **options,
    )


def steps_until(run: Session, step: int | None) -> list[Step]:
    """The steps of a run, which is stopped after `step`."""
    steps = []
    for event in run:
        if isinstance(event, Step):
            steps.append(event)
            if event.step == step:
                run.stop()
    return steps


def losses_until(run: Session, step: int) -> list[float]:
    return [each.loss for each in steps_until(run, step)]
