"""Attention masks: boolean tensors that broadcast to (B, H, T, S); True where a query may look at a key.

Combine them with `&`: `causal_mask(T, S) & padding_mask(tokens, pad)`, or `Causal() & padding_mask(tokens, pad)`, which says the
same without a number for each query and key.
"""

from dataclasses import dataclass
from typing import TypeAlias

from tinygrad import Tensor

from lama.shapes import Bool, Int, Size, as_tensor


@dataclass(frozen=True)
class Causal:
    """Query t stands at position `offset + t` and sees the keys at positions up to its own, but for those that `padding` hides.

    An offset may be a stored int32 of shape (1,): of queries behind those in a cache, for kernels that read it when they run.
    """

    offset: Size | Tensor = 0
    padding: Tensor | None = None

    def __and__(self, padding: Bool[Tensor, "B 1 1 S"]) -> "Causal":
        return Causal(self.offset, padding if self.padding is None else self.padding & padding)

    def as_tensor(self, n_queries: int, n_keys: Size) -> Bool[Tensor, "..."]:
        assert not isinstance(self.offset, Tensor), "only known when it runs"
        mask = causal_mask(n_queries, n_keys, self.offset)
        return mask if self.padding is None else mask & self.padding


Mask: TypeAlias = Tensor | Causal


def causal_mask(n_queries: int, n_keys: Size, offset: Size = 0) -> Bool[Tensor, "T S"]:
    """Query t stands at position `offset + t` and sees the keys at positions up to its own.

    `causal_mask(2, 3, offset=1)` is `[[True, True, False], [True, True, True]]`.
    """
    queries = Tensor.arange(n_queries).reshape(n_queries, 1) + as_tensor(offset)
    return Tensor.arange(n_keys).reshape(1, n_keys) <= queries


def padding_mask(tokens: Int[Tensor, "B S"], pad: int) -> Bool[Tensor, "B 1 1 S"]:
    """Hide the keys whose token is `pad` from every query of their row."""
    return (tokens != pad).reshape(tokens.shape[0], 1, 1, tokens.shape[1])
