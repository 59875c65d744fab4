"""Attention: one function, its similarities, and the single- and multi-head layers made from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Tensor

from lama import ops
from lama.cache import LayerCache
from lama.dropout import Dropout, no_dropout
from lama.layers import Linear, Norm, linear, parameter
from lama.masks import Causal, Mask
from lama.ops import matmul, softmax
from lama.rotary import Rope
from lama.runtime.strides import materialise
from lama.shapes import Float
from lama.taps import Tap, no_tap

Similarity = Callable[[Tensor, Tensor], Tensor]  # (B, H, T, d_head), (B, H, S, d_head) -> (B, H, T, S)
KeysValues = tuple[Tensor, Tensor]  # keys and values, (B, H, S, d_head) each


def dot(q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B S d"]) -> Float[Tensor, "*B T S"]:
    """score(q, k) = qᵀk. Source: Luong et al. 2015, section 3.1."""
    return matmul(q, k, transpose_b=True)


def scaled_dot(q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B S d"]) -> Float[Tensor, "*B T S"]:
    """score(q, k) = qᵀk / √d: unit variance for unit-variance q and k. Source: Vaswani et al. 2017, 3.2.1."""
    return dot(q, k) * (1 / math.sqrt(q.shape[-1]))


@dataclass(frozen=True)
class ScaledBy:
    """score(q, k) = scale · qᵀk."""

    scale: float

    def __call__(self, q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B S d"]) -> Float[Tensor, "*B T S"]:
        return dot(q, k) * self.scale


@dataclass(frozen=True)
class Capped:
    """score(q, k) = cap · tanh(scale · qᵀk / cap), always between −cap and cap. Source: Gemma 2, 2024."""

    scale: float
    cap: float

    def __call__(self, q: Float[Tensor, "*B T d"], k: Float[Tensor, "*B S d"]) -> Float[Tensor, "*B T S"]:
        return soft_cap(dot(q, k) * self.scale, self.cap)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap); x for cap=0."""
    return cap * (x * (1 / cap)).tanh() if cap else x


class General:
    """score(q, k) = qᵀWk with a learned W for each head. Source: Luong et al. 2015, section 3.1."""

    def __init__(self, n_heads: int, d_head: int):
        self.weight = parameter(n_heads, d_head, d_head)

    def __call__(self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H S d"]) -> Float[Tensor, "B H T S"]:
        return dot((q @ self.weight).contiguous(), k)


class Additive:
    """score(q, k) = w_qᵀq + w_kᵀk with learned vectors for each head.

    The first term is the same for every key, so the softmax cancels it: such a head ranks keys whatever the
    query is. (Bahdanau's additive attention has a tanh around the sum, which lets the query matter.)
    """

    def __init__(self, n_heads: int, d_head: int):
        self.query_weight = parameter(n_heads, d_head, 1)
        self.key_weight = parameter(n_heads, d_head, 1)

    def __call__(self, q: Float[Tensor, "B H T d"], k: Float[Tensor, "B H S d"]) -> Float[Tensor, "B H T S"]:
        scores = (k @ self.key_weight).transpose(-2, -1)  # (B, H, 1, S)
        return q @ self.query_weight + scores


SIMILARITIES = ("dot", "scaled_dot", "general", "additive")


def make_similarity(
    name: str, n_heads: int, d_head: int, divisor: int = 1, scale: float = 0.0, cap: float = 0.0
) -> Similarity:
    """The similarity function called `name`, with its own parameters where it has some. Raises ValueError.

    The scores of dot products are divided by `divisor`, and soft-capped with a `cap`; `scale` replaces
    1 / √d_head.
    """
    match name:
        case "dot" | "scaled_dot" if divisor != 1 or scale or cap:
            own = (scale or 1 / math.sqrt(d_head) if name == "scaled_dot" else 1) / divisor
            return Capped(own, cap) if cap else ScaledBy(own)
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
    """The factor of qᵀk, or None if scores are not a constant times qᵀk. Fused kernels need the factor."""
    if isinstance(similarity, ScaledBy):
        return similarity.scale
    if similarity is scaled_dot:
        return 1 / math.sqrt(d_head)
    return 1.0 if similarity is dot else None


def attention(
    q: Float[Tensor, "*B T d_head"],
    k: Float[Tensor, "*K S d_head"],
    v: Float[Tensor, "*K S d_value"],
    mask: Mask | None = None,
    similarity: Similarity = scaled_dot,
    cache: LayerCache | None = None,
    tap: Tap = no_tap,
    dropout: Dropout = no_dropout,
    window: int = 0,
) -> Float[Tensor, "*B T d_value"]:
    """softmax(score(q, k)) v: each query's weighted mean of the values. Source: Vaswani et al. 2017, eq. 1.

    `mask`, Causal or a boolean tensor, is True where a query may look at a key. With a `cache`, the mask is
    not used. k and v are written there, and a query sees all cached keys up to its own, without dropout. With
    a `window`, a query sees only the last `window` of its keys, and `mask` must be Causal. k and v may have
    fewer heads than q; consecutive heads of q then share one. A query that may look at nothing gets the mean
    of all values, not NaN. The softmax is in float32.
    """
    scale = scale_of(similarity, int(q.shape[-1]))
    if tap is no_tap and scale is not None:  # no tap needs the scores: one operation does all of the below
        if cache is not None:
            return cache.attend(q, k, v, scale, window)
        rate, key, site = dropout.rate, dropout.key, dropout.site("pattern")
        if not isinstance(mask, Causal):
            return ops.attention(q, k, v, scale, None, mask, rate, key, site, window)
        offset, padding, starts = mask.offset, mask.padding, mask.starts
        return ops.attention(q, k, v, scale, offset, padding, rate, key, site, window, starts)
    if cache is not None:
        k, v, mask = cache.update(k, v, window)
        dropout = no_dropout
    if isinstance(mask, Causal):
        mask = mask.as_tensor(int(q.shape[-2]), int(k.shape[-2]), window)
    if q.ndim == 4:
        k, v = ops.repeat_heads(k, int(q.shape[1])), ops.repeat_heads(v, int(q.shape[1]))
    scores = tap("scores", ops.hide(similarity(q, k), mask))  # (*B, T, S)
    pattern = tap("pattern", softmax(scores))  # (*B, T, S), rows sum to 1
    return matmul(dropout("pattern", pattern), v)


class QKNorm:
    """Norms of queries and keys. Source: Henry et al. 2020; the whole vector: OLMo 2, 2024.

    Each head is normalised by itself, with the same weights for all; with `whole`, a token's heads are
    normalised as one vector.
    """

    def __init__(
        self, make: Callable[[int], Norm], q_width: int, k_width: int, whole: bool, after_rope: bool
    ):
        """`make(n)` builds a norm over n numbers: `q_width` for queries, `k_width` for keys.

        `after_rope`: whether to normalise after the rotation by positions.
        """
        self.q, self.k, self.whole, self.after_rope = make(q_width), make(k_width), whole, after_rope

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, d_head) and (B, K, T, d_head) -> the same."""
        return self._normalised(self.q, q), self._normalised(self.k, k)

    def _normalised(self, norm: Norm, x: Tensor) -> Tensor:
        if not self.whole:
            return norm(x)
        B, H, T, d = x.shape
        return norm(x.transpose(1, 2).reshape(B, T, H * d)).reshape(B, T, H, d).transpose(1, 2)


class SingleHeadAttention:
    """One head that reads the whole residual stream and returns d_head numbers for each position."""

    def __init__(self, d_model: int, d_head: int, bias: bool = True, similarity: str = "scaled_dot"):
        self.q, self.k, self.v = (Linear(d_model, d_head, bias) for _ in range(3))
        self.similarity = make_similarity(similarity, 1, d_head)

    def __call__(
        self, x: Float[Tensor, "B T d_model"], mask: Mask | None = None, tap: Tap = no_tap
    ) -> Float[Tensor, "B T d_head"]:
        q = tap("q", self.q(x).unsqueeze(1))  # (B, 1, T, d_head), as are k and v
        k = tap("k", self.k(x).unsqueeze(1))
        v = tap("v", self.v(x).unsqueeze(1))
        z = tap("z", attention(q, k, v, mask, self.similarity, tap=tap))
        return z.squeeze(1)  # (B, T, d_head)


class MultiHeadAttention:
    """n_heads heads side by side, their outputs projected back into the residual stream.

    Self-attention reads queries, keys and values from `x`; with `memory`, keys and values come from there
    (cross-attention). One matrix `qkv` holds the three projections: all rows of q, then k, then v, each head
    by head. Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        bias: bool = True,
        similarity: Similarity = scaled_dot,
        *,
        n_kv_heads: int = 0,
        d_head: int = 0,
        out_bias: bool | None = None,
        qk_norm: QKNorm | None = None,
        rope: Rope | None = None,
        window: int = 0,
    ):
        """`bias` applies to `qkv`, and to `out` unless `out_bias` is given. `window` 0 means all keys.

        Keys and values have `n_kv_heads` heads, by default n_heads. A head has `d_head` numbers, by default
        d_model / n_heads. Raises ValueError if one of these is not a multiple of the other.
        """
        if not d_head and d_model % n_heads:
            got = f"d_model={d_model}, n_heads={n_heads}"
            raise ValueError(f"d_model must be a multiple of n_heads; got {got}")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        self.d_head = d_head or d_model // n_heads
        if n_heads % self.n_kv_heads:
            got = f"n_heads={n_heads}, n_kv_heads={n_kv_heads}"
            raise ValueError(f"n_heads must be a multiple of n_kv_heads; got {got}")
        self.widths = [heads * self.d_head for heads in (n_heads, self.n_kv_heads, self.n_kv_heads)]
        self.qkv = Linear(d_model, sum(self.widths), bias)
        self.out = Linear(self.widths[0], d_model, bias if out_bias is None else out_bias)
        self.similarity, self.qk_norm, self.rope, self.window = similarity, qk_norm, rope, window

    def project(
        self, x: Float[Tensor, "B T d_model"], memory: Float[Tensor, "B S d_model"] | KeysValues | None
    ) -> tuple[Float[Tensor, "B H T d_head"], Float[Tensor, "B K S d_head"], Float[Tensor, "B K S d_head"]]:
        """Queries from x; keys and values from memory, or from x where there is none."""
        if memory is None:
            q, k, v = (self._heads(part) for part in self.qkv(x).split(self.widths, dim=-1))
            return q, k, v
        n, weight, bias = self.widths[0], self.qkv.weight, self.qkv.bias
        q = self._heads(linear(x, weight[:n], None if bias is None else bias[:n]))
        return q, *(memory if isinstance(memory, tuple) else self.keys_values(memory))

    def keys_values(self, memory: Float[Tensor, "B S d_model"]) -> KeysValues:
        """The keys and values of `memory`, to pass in its place in later calls."""
        n, weight, bias = self.widths[0], self.qkv.weight, self.qkv.bias
        k, v = linear(memory, weight[n:], None if bias is None else bias[n:]).chunk(2, dim=-1)
        return self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1, self.d_head).transpose(1, 2)

    def positioned(
        self, q: Tensor, k: Tensor, cache: LayerCache | None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys, and rotate them by their positions, where the model does that.

        Positions come from the `cache`, else from `places` (B, T), else they count from 0.
        """
        norm, rope = self.qk_norm, self.rope
        if norm is not None and not norm.after_rope:
            q, k = norm(q, k)
        if rope is not None:
            positions, length = (
                (places, int(q.shape[2])) if cache is None else (cache.positions, cache.length)
            )
            q, k = rope(q, positions, length), rope(k, positions, length)
        return norm(q, k) if norm is not None and norm.after_rope else (q, k)

    def __call__(
        self,
        x: Float[Tensor, "B T d_model"],
        mask: Mask | None = None,
        memory: Float[Tensor, "B S d_model"] | KeysValues | None = None,
        cache: LayerCache | None = None,
        tap: Tap = no_tap,
        dropout: Dropout = no_dropout,
    ) -> Float[Tensor, "B T d_model"]:
        """The heads' outputs, projected back. A `cache`, for self-attention only, holds earlier tokens."""
        q, k, v = self.project(x, memory)
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        if self.rope is not None or self.qk_norm is not None:
            q, k = self.positioned(q, k, cache, mask.places if isinstance(mask, Causal) else None)
            q, k = tap("rot_q", q), tap("rot_k", k)
        z = tap("z", attention(q, k, v, mask, self.similarity, cache, tap, dropout, self.window))
        return self.out(materialise(z.transpose(1, 2).flatten(2)))  # z: (B, H, T, d_head)
