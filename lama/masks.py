"""Attention masks: boolean tensors that broadcast to (B, H, T, S); True where a query may look at a key.

Combine them with `&`: `causal_mask(T, S) & padding_mask(tokens, pad)`. `Causal() & padding_mask(tokens, pad)`
has the same meaning but stores no value for each pair of query and key.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

from tinygrad import Tensor, dtypes

from lama.ops import from_starts, in_sight
from lama.shapes import Bool, Int


@dataclass(frozen=True)
class Causal:
    """A mask that shows query t the keys up to position `offset + t`, except those that `padding` hides.

    In packed rows a query sees only the keys of its own text, those from starts[b, t] on.
    """

    offset: int = 0
    padding: Tensor | None = None
    starts: Tensor | None = None
    """For every token, the place in the row at which its text begins: (B, T) int32."""
    places: Tensor | None = None
    """The tokens' positions in their texts: (B, T) int32."""

    def __and__(self, padding: Bool[Tensor, "B 1 1 S"]) -> "Causal":
        return replace(self, padding=padding if self.padding is None else self.padding & padding)

    def as_tensor(self, n_queries: int, n_keys: int, window: int = 0) -> Bool[Tensor, "..."]:
        """The mask as a boolean tensor; with a `window`, a query sees only the last `window` of its keys."""
        mask = causal_mask(n_queries, n_keys, self.offset, window)
        mask = mask if self.starts is None else mask & from_starts(self.starts, n_keys)
        return mask if self.padding is None else mask & self.padding


Mask: TypeAlias = Tensor | Causal


def packed(starts: Int[Tensor, "B T"]) -> Causal:
    """The mask of rows that hold several texts, with positions counted in each; see `Causal.starts`."""
    starts = starts.cast(dtypes.int32).contiguous()
    places = Tensor.arange(starts.shape[1]).to(starts.device) - starts
    return Causal(starts=starts, places=places.contiguous())


def causal_mask(n_queries: int, n_keys: int, offset: int = 0, window: int = 0) -> Bool[Tensor, "T S"]:
    """A mask that shows query t, at position `offset + t`, the keys at positions up to its own.

    With a `window`, only the last `window` of these. `causal_mask(2, 3, offset=1)` is `[[True, True, False],
    [True, True, True]]`.
    """
    queries = Tensor.arange(n_queries).reshape(n_queries, 1) + offset
    return in_sight(queries, Tensor.arange(n_keys).reshape(1, n_keys), window)


def padding_mask(tokens: Int[Tensor, "B S"], pad: int) -> Bool[Tensor, "B 1 1 S"]:
    """A mask that hides the keys whose token is `pad` from every query of their row."""
    return (tokens != pad).reshape(tokens.shape[0], 1, 1, tokens.shape[1])
