"""Attention masks: boolean tensors that broadcast to (B, H, T, S); True where a query may look at a key.

Combine them with `&`: `causal_mask(T, S) & padding_mask(tokens, pad)`.
"""

from tinygrad import Tensor

from lama.shapes import Bool, Int, Size, as_tensor


def causal_mask(n_queries: int, n_keys: Size, offset: Size = 0) -> Bool[Tensor, "T S"]:
    """Query t stands at position `offset + t` and sees the keys at positions up to its own.

    `causal_mask(2, 3, offset=1)` is `[[True, True, False], [True, True, True]]`.
    """
    queries = Tensor.arange(n_queries).reshape(n_queries, 1) + as_tensor(offset)
    return Tensor.arange(n_keys).reshape(1, n_keys) <= queries


def padding_mask(tokens: Int[Tensor, "B S"], pad: int) -> Bool[Tensor, "B 1 1 S"]:
    """Hide the keys whose token is `pad` from every query of their row."""
    return (tokens != pad).reshape(tokens.shape[0], 1, 1, tokens.shape[1])
