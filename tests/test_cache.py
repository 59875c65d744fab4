"""The KV cache stores tokens behind those that each row holds, and shows each new token those before it."""

import numpy as np
import pytest
from helpers import normal
from tinygrad import Tensor, dtypes

from lama.cache import KVCache

B, H, D_HEAD, LENGTH = 2, 3, 5, 7


def test_cache_returns_all_tokens_so_far():
    cache = KVCache(n_layers=2, batch=B, n_kv_heads=H, length=LENGTH, d_head=D_HEAD)
    k, v = normal(B, H, 6, D_HEAD), normal(B, H, 6, D_HEAD, seed=1)
    for start, end in ((0, 3), (3, 4), (4, 6)):
        new = [Tensor(x[:, :, start:end].copy()) for x in (k, v)]
        keys, values, seen = cache.layers[1].update(*new)
        np.testing.assert_array_equal(keys.numpy()[:, :, :end], k[:, :, :end])
        np.testing.assert_array_equal(values.numpy()[:, :, :end], v[:, :, :end])
        expected = np.arange(LENGTH) <= np.arange(start, end)[:, None]
        np.testing.assert_array_equal(seen.numpy(), np.broadcast_to(expected, (B, 1, end - start, LENGTH)))
        cache.advance(end - start)
    assert (cache.keys[0].numpy() == 0).all()  # the other layer's


def test_cache_overwrites_from_an_earlier_position():
    cache = KVCache(1, B, H, LENGTH, D_HEAD)
    cache.layers[0].update(Tensor.ones(B, H, 4, D_HEAD), Tensor.ones(B, H, 4, D_HEAD))
    cache.seek(np.array([1, 1]))
    cache.layers[0].update(Tensor.full((B, H, 1, D_HEAD), 2.0), Tensor.zeros(B, H, 1, D_HEAD))
    assert cache.keys[0].numpy()[0, 0, :, 0].tolist() == [1, 2, 1, 1, 0, 0, 0]


def test_each_row_has_a_position_of_its_own():
    cache = KVCache(1, B, H, LENGTH, D_HEAD)
    cache.seek(np.array([4, 0]))
    new = normal(B, H, 2, D_HEAD)
    keys, _, seen = cache.layers[0].update(Tensor(new), Tensor(new))
    np.testing.assert_array_equal(keys.numpy()[0, :, 4:6], new[0])
    np.testing.assert_array_equal(keys.numpy()[1, :, :2], new[1])
    assert seen.numpy()[:, 0].sum(-1).tolist() == [[5, 6], [1, 2]]


def test_a_batch_of_some_rows_changes_only_those():
    cache = KVCache(1, 4, H, LENGTH, D_HEAD)
    before = normal(4, H, LENGTH, D_HEAD)
    cache.keys[0].assign(Tensor(before)).realize()
    new = normal(2, H, 2, D_HEAD, seed=3)
    some = cache.at(Tensor([1, 5], dtype=dtypes.int32), Tensor([3, 0], dtype=dtypes.int32))
    keys, _, _ = some.layers[0].update(Tensor(new), Tensor(new))
    before[3, :, 1:3], before[0, :, 5:7] = new[0], new[1]
    np.testing.assert_array_equal(cache.keys[0].numpy(), before)
    np.testing.assert_array_equal(keys.numpy(), before[[3, 0]])


def test_cache_refuses_more_tokens_than_it_holds():
    cache = KVCache(1, B, H, LENGTH, D_HEAD)
    cache.seek(np.array([2, LENGTH - 2]))
    cache.check(2)
    with pytest.raises(ValueError, match="a cache of length 7 cannot hold 8 tokens"):
        cache.check(3)


def test_cache_keeps_its_dtype():
    cache = KVCache(1, B, H, LENGTH, D_HEAD, dtype=dtypes.float16)
    keys, values, _ = cache.layers[0].update(Tensor.ones(B, H, 2, D_HEAD), Tensor.ones(B, H, 2, D_HEAD))
    assert keys.dtype == values.dtype == dtypes.float16
