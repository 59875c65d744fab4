"""The KV cache: keys and values of the tokens already seen, so that a new token costs one row and not the whole prompt."""

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from lama import kernels
from lama.shapes import Float, Int, Size, as_tensor


class KVCache:
    """Fixed buffers for one batch of sequences, made once and handed to the model with every call.

    A fixed size keeps TinyJit's captured kernels valid for every later token. Memory: 2 · n_layers · B · length ·
    d_model numbers; 72 MiB for GPT-2 124M at 1,024 tokens in float32.
    """

    def __init__(
        self, n_layers: int, batch: int, n_heads: int, length: int, d_head: int, dtype: DType = dtypes.float32, device: str | None = None
    ):
        shape = (batch, n_heads, length, d_head)
        self.length = length
        self.keys, self.values = ([kernels.stored_zeros(*shape, dtype=dtype, device=device) for _ in range(n_layers)] for _ in "kv")

    def stored_position(self, position: Size, n: int) -> Tensor | None:
        """`position` as `attend` takes it; None where no kernel serves n tokens here. Raises ValueError if they do not fit."""
        if not kernels.attends_in(self.keys[0], n):
            return None
        self._end(position, n)
        return as_tensor(position).cast(dtypes.int32).reshape(1).clone(device=str(self.keys[0].device))

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B H T d_head"],
        k: Float[Tensor, "B H T d_head"],
        v: Float[Tensor, "B H T d_head"],
        position: Int[Tensor, "1"],
        scale: float,
    ) -> Float[Tensor, "B H T d_head"]:
        """Store the keys and values of T tokens at `position`, and let their queries look at all up to their own: one kernel."""
        return kernels.attention_in_cache(q, k, v, self.keys[layer], self.values[layer], position, scale)

    def update(
        self, layer: int, k: Float[Tensor, "B H T d_head"], v: Float[Tensor, "B H T d_head"], position: Size
    ) -> tuple[Float[Tensor, "B H S d_head"], Float[Tensor, "B H S d_head"]]:
        """Store the keys and values of T tokens at `position` and return those of all S = position + T tokens.

        Raises ValueError if they do not fit (a bound variable carries its own upper limit and is not checked).
        """
        end = self._end(position, int(k.shape[2]))
        keys, values = self.keys[layer], self.values[layer]
        # Realised here, so that every layer is one and the same schedule, which tinygrad works out once.
        Tensor.realize(*(old[:, :, position:end].assign(new.cast(old.dtype)) for old, new in ((keys, k), (values, v))))
        return keys[:, :, :end], values[:, :, :end]

    def _end(self, position: Size, n: int) -> Size:
        """Where n tokens at `position` end. Raises ValueError if that is behind the end of the cache."""
        end = position + n
        if isinstance(end, int) and end > self.length:
            raise ValueError(f"the cache must hold every token; got {end} tokens for a cache of {self.length}. Make it longer")
        return end
