"""Rotary positions: queries and keys are rotated by their positions, so that scores depend on distances."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor, dtypes

from lama.ops import rotate
from lama.runtime.buffers import from_array
from lama.shapes import Float, Int


@dataclass(frozen=True)
class Rope:
    """Rotary positions: attention rotates queries and keys by their positions. Source: Su et al. 2021.

    The first `d_rotated` numbers of a head are rotated, number i with number i + d_rotated / 2, at the
    frequency θ^(−2i / d_rotated). `scaling` is empty, or (factor,), which divides all frequencies, or Llama
    3's (factor, low, high, length). Then frequencies of fewer than `low` periods in `length` tokens are
    divided by `factor`, those of more than `high` stay, and those between are interpolated. Source:
    Grattafiori et al. 2024.
    """

    d_rotated: int
    theta: float = 10000.0
    scaling: tuple[float, ...] = ()

    def frequencies(self) -> NDArray[np.float32]:
        """Radians per position, (d_rotated / 2,)."""
        exponents = np.arange(0, self.d_rotated, 2).astype(np.float32) / np.float32(self.d_rotated)
        found = (1 / np.float32(self.theta) ** exponents).astype(np.float32)
        if not self.scaling:
            return found
        slowed = found / np.float32(self.scaling[0])
        if len(self.scaling) == 1:
            return slowed
        _, low, high, length = self.scaling
        periods = length / (2 * math.pi / found)
        stays = ((periods - low) / (high - low)).clip(0, 1)
        return ((1 - stays) * slowed + stays * found).astype(np.float32)

    def __call__(
        self, x: Float[Tensor, "B H T d_head"], positions: Int[Tensor, "B *T"] | None, length: int
    ) -> Float[Tensor, "B H T d_head"]:
        """Rotate each token by its position, as `ops.rotate` does; all positions are below `length`."""
        return rotate(x, self.table(length, str(x.device)), positions)

    def table(self, length: int, device: str) -> Float[Tensor, "positions d_rotated"]:
        """Row p has the cosines of p · frequencies, then the sines; at least `length` rows."""
        return _rope_table(self, 1 << (length - 1).bit_length(), device)


@functools.lru_cache(maxsize=8)
def _rope_table(rope: Rope, length: int, device: str) -> Tensor:
    angles = np.arange(length, dtype=np.float32)[:, None] * rope.frequencies()
    return from_array(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), dtypes.float32, device)
