"""The KV cache stores rows where it is told to and gives back all of them."""

import numpy as np
import pytest
from helpers import normal
from tinygrad import Tensor, dtypes

from lama.cache import KVCache

B, H, D_HEAD, LENGTH = 2, 3, 5, 7


def test_cache_returns_all_tokens_so_far():
    cache = KVCache(n_layers=2, batch=B, n_heads=H, length=LENGTH, d_head=D_HEAD)
    k, v = normal(B, H, 6, D_HEAD), normal(B, H, 6, D_HEAD, seed=1)
    for start, end in ((0, 3), (3, 4), (4, 6)):
        keys, values = cache.update(1, Tensor(k[:, :, start:end].copy()), Tensor(v[:, :, start:end].copy()), start)
        np.testing.assert_array_equal(keys.numpy(), k[:, :, :end])
        np.testing.assert_array_equal(values.numpy(), v[:, :, :end])
    assert (cache.keys[0].numpy() == 0).all()  # the other layer's


def test_cache_overwrites_from_an_earlier_position():
    cache = KVCache(1, B, H, LENGTH, D_HEAD)
    cache.update(0, Tensor.ones(B, H, 4, D_HEAD), Tensor.ones(B, H, 4, D_HEAD), 0)
    keys, _ = cache.update(0, Tensor.full((B, H, 1, D_HEAD), 2.0), Tensor.zeros(B, H, 1, D_HEAD), 1)
    assert keys.numpy()[0, 0, :, 0].tolist() == [1, 2]
    assert cache.keys[0].numpy()[0, 0, :, 0].tolist() == [1, 2, 1, 1, 0, 0, 0]


def test_cache_refuses_more_tokens_than_it_holds():
    cache = KVCache(1, B, H, LENGTH, D_HEAD)
    new = Tensor.ones(B, H, 3, D_HEAD)
    cache.update(0, new, new, LENGTH - 3)
    with pytest.raises(ValueError, match="got 8 tokens for a cache of 7"):
        cache.update(0, new, new, LENGTH - 2)


def test_cache_keeps_its_dtype():
    cache = KVCache(1, B, H, LENGTH, D_HEAD, dtype=dtypes.float16)
    keys, values = cache.update(0, Tensor.ones(B, H, 2, D_HEAD), Tensor.ones(B, H, 2, D_HEAD), 0)
    assert keys.dtype == values.dtype == dtypes.float16
