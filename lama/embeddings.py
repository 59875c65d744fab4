"""Tokens to vectors, positions to vectors, vectors to logits."""

import functools
import math

import numpy as np
from tinygrad import Tensor

from lama.errors import LamaError
from lama.kernels import Quantized, embedding, host_numbers
from lama.layers import Linear, linear, parameter
from lama.shapes import Float, Int, Size


class TokenEmbedding:
    """A row of `weight` for each token; `unembed` uses the same rows as the output layer (tied embeddings)."""

    def __init__(self, vocab_size: int, d_model: int):
        self.weight: Tensor | Quantized = parameter(vocab_size, d_model)

    def __call__(
        self, tokens: Int[Tensor, "B T"], positions: Float[Tensor, "n d_model"] | None = None, position: Size | Tensor = 0
    ) -> Float[Tensor, "B T d_model"]:
        """With `positions`, the T rows of it from `position` on are added. Raises LamaError for tokens on the host that are no rows."""
        if (ids := host_numbers(tokens)) is not None:
            check_ids(ids, int(self.weight.shape[0]))
        return embedding(self.weight, tokens, positions, position)

    def unembed(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """logits = x Eᵀ. Source: Press & Wolf 2017."""
        return linear(x, self.weight)


def check_ids(ids: np.ndarray, rows: int) -> None:
    """Raises LamaError for the first id that is not between 0 and rows − 1."""
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        raise LamaError(f"ids must be from 0 to {rows - 1}; got {ids[(ids < 0) | (ids >= rows)][0]}")


def unembedding(d_model: int, vocab_size: int) -> Linear:
    """The untied output layer: its own matrix, no bias."""
    return Linear(d_model, vocab_size, bias=False)


class LearnedPositions:
    """A learned row for each of `context_length` positions."""

    def __init__(self, context_length: int, d_model: int):
        self.weight = parameter(context_length, d_model)

    def __call__(self, n: int, position: Size = 0) -> Float[Tensor, "n d_model"]:
        return self.weight[position : position + n]


def sinusoids(n_positions: int, d_model: int) -> np.ndarray:
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos(the same); (n_positions, d_model), float32.

    Source: Vaswani et al. 2017, section 3.5.
    """
    frequencies = np.exp(-math.log(10000.0) * np.arange(0, d_model, 2) / d_model)  # (ceil(d_model / 2),)
    angles = np.arange(n_positions)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(n_positions, -1)[:, :d_model].astype(np.float32)


class SinusoidalPositions:
    """The fixed position encoding of the original paper: nothing to learn, nothing to save."""

    def __init__(self, context_length: int, d_model: int):
        self.shape = context_length, d_model

    @functools.cached_property
    def table(self) -> np.ndarray:
        """(context_length, d_model), computed at the first use; numpy, as a Tensor here would be a parameter."""
        return sinusoids(*self.shape)

    def __call__(self, n: int, position: Size = 0) -> Float[Tensor, "n d_model"]:
        # Not computed on the device: every kernel that reads the sum would take the sines again.
        return Tensor(self.table)[position : position + n]


class NoPositions:
    """Nothing: only a causal mask then tells a model something of the order of its tokens."""

    def __call__(self, n: int, position: Size = 0) -> Float[Tensor, "n d_model"]:
        return Tensor.zeros(n, 1)


POSITIONS = ("learned", "sinusoidal", "none")


def make_positions(kind: str, context_length: int, d_model: int) -> LearnedPositions | SinusoidalPositions | NoPositions:
    """The position encoding called `kind`, one of POSITIONS. Raises ValueError."""
    match kind:
        case "learned":
            return LearnedPositions(context_length, d_model)
        case "sinusoidal":
            return SinusoidalPositions(context_length, d_model)
        case "none":
            return NoPositions()
    raise ValueError(f"positions must be one of {', '.join(POSITIONS)}; got {kind!r}")
