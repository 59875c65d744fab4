"""The KV cache: keys and values of all tokens so far, so that a new token costs one row of the model."""

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor, dtypes

from lama import ops
from lama.runtime.buffers import from_array, zeros
from lama.runtime.internals import DType
from lama.shapes import Array, Bool, Float, Int


@dataclass(frozen=True)
class LayerCache:
    """The part of a cache that one attention layer reads and writes."""

    keys: Float[Tensor, "R K S d_head"]
    values: Float[Tensor, "R K S d_head"]
    positions: Int[Tensor, "B"]
    """The tokens that each row of the batch already has here; its new ones are written behind them."""
    rows: Int[Tensor, "B"] | None = None
    """The row of the cache for each row of the batch; None: row b for row b."""

    @property
    def length(self) -> int:
        """Most tokens of a row."""
        return int(self.keys.shape[2])

    def attend(
        self,
        q: Float[Tensor, "B H T d_head"],
        k: Float[Tensor, "B K T d_head"],
        v: Float[Tensor, "B K T d_head"],
        scale: float,
        window: int = 0,
    ) -> Float[Tensor, "B H T d_head"]:
        """Write k and v; scaled dot-product attention of each query to the keys up to its own."""
        places = self.keys, self.values, self.positions, self.rows
        return ops.attention_in_cache(q, k, v, *places, scale, window)

    def update(
        self, k: Float[Tensor, "B K T d_head"], v: Float[Tensor, "B K T d_head"], window: int = 0
    ) -> tuple[Float[Tensor, "B K S d_head"], Float[Tensor, "B K S d_head"], Bool[Tensor, "B 1 T S"]]:
        """Write k and v; all keys and values of the batch's rows, and which of them each new token sees."""
        return ops.write_to_cache(k, v, self.keys, self.values, self.positions, self.rows, window)


class KVCache:
    """Fixed buffers for the sequences of one batch, handed to the model with every call.

    `positions` (B,) int32 counts the tokens that each row holds; the model writes new tokens behind them.
    `advance` counts these too, and `at` gives other positions. The fixed size keeps captured kernels valid
    for every later token. Memory: 2 · n_layers · B · length · n_kv_heads · d_head numbers; 72 MiB for GPT-2
    124M at 1,024 tokens in float32.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        length: int,
        d_head: int,
        dtype: DType = dtypes.float32,
        device: str | None = None,
    ):
        shape = (batch, n_kv_heads, length, d_head)
        self.length = length
        self.keys = [zeros(*shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.values = [zeros(*shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.seek(np.zeros(batch, np.int32))

    @property
    def layers(self) -> list[LayerCache]:
        """The part of each attention layer."""
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, self.positions, self.rows) for keys, values in pairs]

    def at(self, positions: Int[Tensor, "B"], rows: Int[Tensor, "B"] | None = None) -> "KVCache":
        """The same buffers with other positions, and rows for a batch of fewer. Nothing is checked."""
        other = copy.copy(self)
        other.positions, other.rows, other._held = positions, rows, None
        return other

    def seek(self, positions: Array) -> None:
        """Set the number of tokens that each row holds, (B,)."""
        self._held: NDArray[np.int32] | None = positions.astype(np.int32)
        self.positions = from_array(self._held, dtypes.int32, str(self.keys[0].device) if self.keys else None)
        self.rows: Tensor | None = None

    def advance(self, n: int) -> None:
        """Count n more tokens in each row, those of the model's last call."""
        assert self._held is not None, "the positions of this cache are known on the device only"
        self.seek(self._held + n)

    def check(self, n: int) -> None:
        """Raise ValueError if n more tokens do not fit. Positions known only on the device are unchecked."""
        if self._held is not None and (end := int(self._held.max()) + n) > self.length:
            got = f"got {end} tokens for a cache of {self.length}"
            raise ValueError(f"the cache must hold every token; {got}. Make it longer")
