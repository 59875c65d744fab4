"""The KV cache: keys and values of all tokens so far, so that a step computes only the new tokens."""

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
    """The number of tokens that each row of the batch already holds; new ones are written after them."""
    rows: Int[Tensor, "B"] | None = None
    """The row of the cache that each row of the batch uses; None: row b uses row b."""

    @property
    def length(self) -> int:
        """The most tokens that a row can hold."""
        return int(self.keys.shape[2])

    def attend(
        self,
        q: Float[Tensor, "B H T d_head"],
        k: Float[Tensor, "B K T d_head"],
        v: Float[Tensor, "B K T d_head"],
        scale: float,
        window: int = 0,
    ) -> Float[Tensor, "B H T d_head"]:
        """Write k and v; return the scaled dot-product attention of each query to the keys up to its own."""
        places = self.keys, self.values, self.positions, self.rows
        return ops.attention_in_cache(q, k, v, *places, scale, window)

    def update(
        self, k: Float[Tensor, "B K T d_head"], v: Float[Tensor, "B K T d_head"], window: int = 0
    ) -> tuple[Float[Tensor, "B K S d_head"], Float[Tensor, "B K S d_head"], Bool[Tensor, "B 1 T S"]]:
        """Write k and v; return the batch's keys and values, and a mask of those that each new token sees."""
        return ops.write_to_cache(k, v, self.keys, self.values, self.positions, self.rows, window)


class KVCache:
    """Buffers of fixed size for the sequences of one batch, passed to the model with every call.

    `positions` (B,) int32 is the number of tokens that each row holds. The model writes new tokens after
    them; then the caller counts these with `advance`. The fixed size keeps captured kernels valid for every
    later token. Memory: 2 · n_layers · B · length · n_kv_heads · d_head numbers; 72 MiB for GPT-2 124M at
    1,024 tokens in float32.
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
        """The same buffers with other positions; `rows` are those of a smaller batch. Nothing is checked."""
        other = copy.copy(self)
        other.positions, other.rows, other._held = positions, rows, None
        return other

    def seek(self, positions: Array) -> None:
        """Set the number of tokens that each row holds, (B,)."""
        self._held: NDArray[np.int32] | None = positions.astype(np.int32)
        self.positions = from_array(self._held, dtypes.int32, str(self.keys[0].device) if self.keys else None)
        self.rows: Tensor | None = None

    def advance(self, n: int) -> None:
        """Add n, the tokens of the model's last call, to each row's position."""
        assert self._held is not None, "the positions of this cache are known on the device only"
        self.seek(self._held + n)

    def check(self, n: int) -> None:
        """Raise ValueError if n more tokens do not fit. Positions known only on the device are unchecked."""
        if self._held is not None and (end := int(self._held.max()) + n) > self.length:
            raise ValueError(f"a cache of length {self.length} cannot hold {end} tokens. Make it longer")
