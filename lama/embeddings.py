"""Tokens to vectors, positions to vectors, vectors to logits."""

import functools
import math

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor

from lama.errors import LamaError
from lama.kernels import Quantized
from lama.layers import Linear, linear, parameter
from lama.ops import embedding, position_rows
from lama.runtime.buffers import host_numbers
from lama.shapes import Array, Float, Int


class TokenEmbedding:
    """A row of `weight` for each token; `unembed` reuses the rows as the output layer (tied embeddings)."""

    def __init__(self, vocab_size: int, d_model: int):
        self.weight: Tensor | Quantized = parameter(vocab_size, d_model)

    def __call__(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T d_model"]:
        """The tokens' rows. Raises LamaError for ids without a row, if the ids are in the host's memory."""
        if (ids := host_numbers(tokens)) is not None:
            check_ids(ids, int(self.weight.shape[0]))
        return embedding(self.weight, tokens)

    def unembed(self, x: Float[Tensor, "B T d_model"]) -> Float[Tensor, "B T vocab_size"]:
        """logits = x Eᵀ. Source: Press & Wolf 2017."""
        return linear(x, self.weight)


def check_ids(array: Array, rows: int) -> None:
    """Raise LamaError for the first id that is not between 0 and rows − 1."""
    ids = array.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        raise LamaError(f"ids must be from 0 to {rows - 1}; got {ids[(ids < 0) | (ids >= rows)][0]}")


def unembedding(d_model: int, vocab_size: int, bias: bool = False) -> Linear:
    """The untied output layer: its own matrix."""
    return Linear(d_model, vocab_size, bias)


class LearnedPositions:
    """A learned row for each of `context_length` positions."""

    def __init__(self, context_length: int, d_model: int):
        self.weight = parameter(context_length, d_model)

    def __call__(self, n: int, positions: Int[Tensor, "B *n"] | None = None) -> Float[Tensor, "*B n d_model"]:
        """The rows of n tokens: from position 0, from positions (B,), or at positions (B, n)."""
        return position_rows(self.weight, n, positions)


def sinusoids(n_positions: int, d_model: int) -> NDArray[np.float32]:
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos(the same); (n_positions, d_model), float32.

    Source: Vaswani et al. 2017, section 3.5.
    """
    frequencies = np.exp(-math.log(10000.0) * np.arange(0, d_model, 2) / d_model)  # (ceil(d_model / 2),)
    angles = np.arange(n_positions)[:, None] * frequencies
    pairs = np.stack([np.sin(angles), np.cos(angles)], axis=-1)  # (n_positions, ceil(d_model / 2), 2)
    return pairs.reshape(n_positions, -1)[:, :d_model].astype(np.float32)


class SinusoidalPositions:
    """The fixed position encoding of the original paper, without parameters."""

    def __init__(self, context_length: int, d_model: int, scale: float = 1.0):
        """The encoding is multiplied by `scale`."""
        self.table = context_length, d_model, scale

    def __call__(self, n: int, positions: Int[Tensor, "B *n"] | None = None) -> Float[Tensor, "*B n d_model"]:
        """The rows of n tokens: from position 0, from positions (B,), or at positions (B, n)."""
        device = None if positions is None else str(positions.device)
        return position_rows(_sinusoid_table(*self.table, device), n, positions)


@functools.lru_cache(maxsize=4)
def _sinusoid_table(context_length: int, d_model: int, scale: float, device: str | None) -> Tensor:
    """The table, realised so that no reader computes it again. An attribute would count as a parameter."""
    return Tensor(sinusoids(context_length, d_model) * np.float32(scale), device=device).realize()


class NoPositions:
    """No encoding: a model then learns of the order of its tokens only through a causal mask."""

    def __call__(self, n: int, positions: Int[Tensor, "B *n"] | None = None) -> Float[Tensor, "n 1"]:
        """Zeros."""
        return Tensor.zeros(n, 1)


POSITIONS = ("learned", "sinusoidal", "none")


Positions = LearnedPositions | SinusoidalPositions | NoPositions


def make_positions(kind: str, context_length: int, d_model: int) -> Positions:
    """The position encoding called `kind`, one of POSITIONS. Raises ValueError."""
    match kind:
        case "learned":
            return LearnedPositions(context_length, d_model)
        case "sinusoidal":
            return SinusoidalPositions(context_length, d_model)
        case "none" | "rope":  # attention applies rotary positions
            return NoPositions()
    raise ValueError(f"positions must be one of {', '.join(POSITIONS)}; got {kind!r}")
