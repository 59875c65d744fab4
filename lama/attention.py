"""Attention: one function, the similarities it can use, and the single- and multi-head layers made from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Tensor, dtypes

from lama import kernels
from lama.cache import KVCache
from lama.dropout import Dropout, no_dropout
from lama.kernels import matmul, softmax, stored
from lama.layers import Linear, linear, parameter
from lama.masks import Causal, Mask
from lama.shapes import Float, Size
from lama.taps import Tap, no_tap

HIDDEN = -3.4e38  # the score of a key that may not be looked at: exp(HIDDEN - max) is exactly 0, and never NaN
Similarity = Callable[[Tensor, Tensor], Tensor]  # (B, H, T, d_head), (B, H, S, d_head) -> (B, H, T, S)
KeysValues = tuple[Tensor, Tensor]  # keys and values, (B, H, S, d_head) each


def dot(q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B S d"]) -> Float[Tensor, "*B T S"]:
    """score(q, k) = qᵀk. Source: Luong et al. 2015, section 3.1."""
    return matmul(q, k, transpose_b=True)


def scaled_dot(q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B S d"]) -> Float[Tensor, "*B T S"]:
    """score(q, k) = qᵀk / √d: unit variance for unit-variance q and k. Source: Vaswani et al. 2017, section 3.2.1."""
    return dot(q, k) * (1 / math.sqrt(q.shape[-1]))


@dataclass(frozen=True)
class ScaledBy:
    """score(q, k) = scale · qᵀk."""

    scale: float

    def __call__(self, q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B S d"]) -> Float[Tensor, "*B T S"]:
        return dot(q, k) * self.scale


class General:
    """score(q, k) = qᵀWk with a learned W for each head. Source: Luong et al. 2015, section 3.1."""

    def __init__(self, n_heads: int, d_head: int):
        self.weight = parameter(n_heads, d_head, d_head)

    def __call__(self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H S d"]) -> Float[Tensor, "B H T S"]:
        return dot((q @ self.weight).contiguous(), k)


class Additive:
    """score(q, k) = w_qᵀq + w_kᵀk with learned vectors for each head.

    The first term is the same for every key, so the softmax cancels it: such a head ranks keys without regard to
    the query. (Bahdanau's additive attention has a tanh between, which is what lets the query matter.)
    """

    def __init__(self, n_heads: int, d_head: int):
        self.query_weight = parameter(n_heads, d_head, 1)
        self.key_weight = parameter(n_heads, d_head, 1)

    def __call__(self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H S d"]) -> Float[Tensor, "B H T S"]:
        return (q @ self.query_weight) + (k @ self.key_weight).transpose(-2, -1)  # (B, H, T, 1) + (B, H, 1, S)


SIMILARITIES = ("dot", "scaled_dot", "general", "additive")


def make_similarity(name: str, n_heads: int, d_head: int) -> Similarity:
    """The similarity function called `name`, with its own parameters where it has some. Raises ValueError."""
    match name:
        case "dot":
            return dot
        case "scaled_dot":
            return scaled_dot
        case "general":
            return General(n_heads, d_head)
        case "additive":
            return Additive(n_heads, d_head)
    raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {name!r}")


def scale_of(similarity: Similarity, d_head: int) -> float | None:
    """The factor applied to qᵀk, or None if the similarity is not a scaled dot product. Kernels support only those."""
    if isinstance(similarity, ScaledBy):
        return similarity.scale
    return 1.0 if similarity is dot else 1 / math.sqrt(d_head) if similarity is scaled_dot else None


def attention(
    q: Float[Tensor, "*B T d_head"],
    k: Float[Tensor, "*B S d_head"],
    v: Float[Tensor, "*B S d_value"],
    mask: Mask | None = None,
    similarity: Similarity = scaled_dot,
    tap: Tap = no_tap,
    dropout: Dropout = no_dropout,
) -> Float[Tensor, "*B T d_value"]:
    """softmax(score(q, k)) v: each query's weighted mean of the values. Source: Vaswani et al. 2017, eq. 1.

    `mask` is True where a query may look at a key. A query that may look at nothing gets the mean of all values, not
    NaN. The softmax is computed in float32 whatever the inputs' dtype.
    """
    if tap is no_tap and (z := _without_scores(q, k, v, mask, similarity, dropout)) is not None:
        return z
    if isinstance(mask, Causal):
        mask = mask.as_tensor(int(q.shape[-2]), k.shape[-2])
    scores = similarity(q, k).cast(dtypes.float32)  # (*B, T, S)
    if mask is not None:
        scores = mask.where(scores, HIDDEN)
    scores = tap("scores", scores)
    pattern = tap("pattern", softmax(scores))  # (*B, T, S), rows sum to 1
    return matmul(dropout("pattern", pattern), v)


def _without_scores(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, similarity: Similarity, dropout: Dropout) -> Tensor | None:
    """`attention` where a kernel does all of it, else None."""
    scale = scale_of(similarity, int(q.shape[-1]))
    offset, padding = (mask.offset, mask.padding) if isinstance(mask, Causal) else (None, mask)
    if scale is None or not (offset is None or (isinstance(offset, int) and offset >= 0)) or not kernels.attends(q, k, v, padding):
        return None
    return kernels.attention(q, k, v, scale, offset, padding, dropout.rate, dropout.key, dropout.site("pattern"))


class SingleHeadAttention:
    """One head that looks at the whole residual stream and writes d_head numbers for each position."""

    def __init__(self, d_model: int, d_head: int, bias: bool = True, similarity: str = "scaled_dot"):
        self.q, self.k, self.v = (Linear(d_model, d_head, bias) for _ in range(3))
        self.similarity = make_similarity(similarity, 1, d_head)

    def __call__(self, x: Float[Tensor, "B T d_model"], mask: Mask | None = None, tap: Tap = no_tap) -> Float[Tensor, "B T d_head"]:
        q, k, v = (tap(name, project(x).unsqueeze(1)) for name, project in (("q", self.q), ("k", self.k), ("v", self.v)))
        return tap("z", attention(q, k, v, mask, self.similarity, tap)).squeeze(1)  # (B, 1, T, d_head) -> (B, T, d_head)


class MultiHeadAttention:
    """n_heads heads side by side, their outputs projected back into the residual stream.

    Self-attention reads queries, keys and values from `x`; with `memory`, keys and values come from there
    (cross-attention). One matrix `qkv` holds the three projections, rows in the order q, k, v, head by head.
    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(self, d_model: int, n_heads: int, bias: bool = True, similarity: str = "scaled_dot", divisor: float = 1.0):
        """A `divisor` divides the scores of a scaled dot product, too. Raises ValueError."""
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads; got d_model={d_model}, n_heads={n_heads}")
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.qkv = Linear(d_model, 3 * d_model, bias)
        self.out = Linear(d_model, d_model, bias)
        self.similarity = make_similarity(similarity, n_heads, self.d_head)
        self.scale = scale_of(self.similarity, self.d_head)
        if self.scale is not None and divisor != 1:
            self.scale /= divisor
            self.similarity = ScaledBy(self.scale)

    def project(
        self, x: Float[Tensor, "B T d_model"], memory: Float[Tensor, "B S d_model"] | KeysValues | None
    ) -> tuple[Float[Tensor, "B H T d_head"], Float[Tensor, "B H S d_head"], Float[Tensor, "B H S d_head"]]:
        """Queries from x; keys and values from memory, or from x where there is none."""
        d_model = x.shape[-1]
        if memory is None:
            q, k, v = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
            return q, k, v
        weight, bias = self.qkv.weight, self.qkv.bias
        q = self._heads(linear(x, weight[:d_model], None if bias is None else bias[:d_model]))
        return q, *(memory if isinstance(memory, tuple) else self.keys_values(memory))

    def keys_values(self, memory: Float[Tensor, "B S d_model"]) -> KeysValues:
        """What cross-attention makes of `memory`: may be handed to each later call in the memory's place."""
        d_model, weight, bias = memory.shape[-1], self.qkv.weight, self.qkv.bias
        k, v = linear(memory, weight[d_model:], None if bias is None else bias[d_model:]).chunk(2, dim=-1)
        return self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.n_heads, self.d_head).transpose(1, 2)

    def __call__(
        self,
        x: Float[Tensor, "B T d_model"],
        mask: Mask | None = None,
        memory: Float[Tensor, "B S d_model"] | KeysValues | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        position: Size = 0,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """With a `cache`, the keys and values of this call are stored there as those of `layer` at `position`, or at the offset of
        a causal mask whose offset is a tensor: then without looking at anything through `tap`."""
        B, T, d_model = x.shape
        q, k, v = self.project(x, memory)
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        if cache is not None and self.scale is not None and isinstance(mask, Causal) and isinstance(mask.offset, Tensor):
            z = cache.attend(layer, q, k, v, mask.offset, self.scale)  # (B, H, T, d_head)
        else:
            if cache is not None:
                k, v = cache.update(layer, k, v, position)
            z = tap("z", attention(q, k, v, mask, self.similarity, tap, dropout))  # (B, H, T, d_head)
        return self.out(stored(z.transpose(1, 2).reshape(B, T, d_model)))
