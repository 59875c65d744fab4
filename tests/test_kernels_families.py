"""The parts of today's families: RMSNorm, rotary positions, gated products, grouped heads and windows, each
against its formula in numpy, with kernels and without.
"""

import numpy as np
import pytest
from helpers import normal
from test_kernels import assert_all_close, both, needs_c, ran, results  # noqa: F401  (fixtures)
from test_kernels_attention import attention64
from tinygrad import Tensor, dtypes

from lama import ops
from lama.layers import ACTIVATIONS
from lama.rotary import Rope


@pytest.mark.parametrize("d", [2, 33, 60, 128])
def test_rmsnorm_and_its_gradients(both, d: int):  # noqa: F811
    x, w, dy = normal(3, 5, d), normal(d, seed=1), normal(3, 5, d, seed=2)
    wide, scale = x.astype(float), 1 / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-3)
    z, g = wide * scale, dy.astype(float) * w
    dx = (g - z * (g * z).mean(-1, keepdims=True)) * scale
    expected = [z * w, dx, (dy * z).sum((0, 1))]
    tensors = Tensor(x), Tensor(w)
    assert_all_close(results(ops.rmsnorm(*tensors, 1e-3), dy, *tensors), expected, 2e-6)


def test_rmsnorm_of_a_sum_and_without_a_weight(both):  # noqa: F811
    x, h, w, dy = normal(2, 5, 24), normal(2, 5, 24, seed=1), normal(24, seed=2), normal(2, 5, 24, seed=3)
    tensors = [Tensor(t).realize() for t in (x, h, w)]
    total = (x + h).astype(float)
    normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5)
    y = ops.rmsnorm(ops.add(*tensors[:2]), tensors[2], 1e-5)
    dx, dh, _ = y.gradient(*tensors, gradient=Tensor(dy))
    Tensor.realize(y, dx, dh)
    assert_all_close([y.numpy(), dx.numpy()], [normed * w, dh.numpy()])
    plain = ops.rmsnorm(Tensor(x + h), None, 1e-5)
    assert_all_close([plain.numpy()], [normed])


@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_gated_product_and_its_gradients(both, activation: str):  # noqa: F811
    x, up, dy = normal(3, 77), normal(3, 77, seed=1), normal(3, 77, seed=2)

    def gate(x: np.ndarray) -> np.ndarray:
        inner = x if activation == "silu" else 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        return x / (1 + np.exp(-inner))

    wide, step = x.astype(float), 1e-5
    slope = (gate(wide + step) - gate(wide - step)) / (2 * step)
    expected = [gate(wide) * up, dy * up * slope, dy * gate(wide)]
    tensors = Tensor(x), Tensor(up)
    assert_all_close(results(ops.gated(*tensors, ACTIVATIONS[activation]), dy, *tensors), expected, 2e-6)


@pytest.mark.parametrize(
    ("heads", "kv", "d", "rotated", "positions"),
    [(6, 2, 10, 10, None), (3, 3, 64, 24, [3, 17]), (4, 1, 22, 22, [5, 0])],
)
def test_rotation_and_its_gradient(both, heads, kv, d, rotated, positions):  # noqa: F811
    B, T, rope = 2, 7, Rope(rotated, 100.0, (2.0,))
    joined = normal(B, T, (heads + 2 * kv) * d)
    angles = np.arange(T) + np.array(positions or [0, 0])[:, None]  # (B, T)
    angles = (angles[..., None] * rope.frequencies())[:, None]  # (B, 1, T, r)
    r, cos, sin = rotated // 2, np.cos(angles), np.sin(angles)

    def turned(x: np.ndarray, sign: int) -> np.ndarray:
        a, b = x[..., :r], x[..., r : 2 * r]
        return np.concatenate([a * cos - sign * b * sin, b * cos + sign * a * sin, x[..., 2 * r :]], -1)

    def split(x: np.ndarray) -> list[np.ndarray]:
        parts = np.split(x, [heads * d, (heads + kv) * d], axis=-1)
        return [part.reshape(B, T, -1, d).swapaxes(1, 2) for part in parts]

    x = Tensor(joined).realize()
    places = None if positions is None else Tensor(positions, dtype=dtypes.int32).realize()
    parts = [
        part.reshape(B, T, -1, d).transpose(1, 2) for part in x.split([heads * d, kv * d, kv * d], dim=-1)
    ]
    q, k = (rope(part, places, 32) for part in parts[:2])
    dq, dk = normal(B, heads, T, d, seed=1), normal(B, kv, T, d, seed=2)
    (dx,) = ((q * Tensor(dq)).sum() + (k * Tensor(dk)).sum()).gradient(x)
    Tensor.realize(q, k, dx)
    own_q, own_k, _ = split(joined.astype(float))
    assert_all_close([q.numpy(), k.numpy()], [turned(own_q, 1), turned(own_k, 1)], 2e-6)
    found = split(dx.numpy())
    assert_all_close(found[:2], [turned(dq.astype(float), -1), turned(dk.astype(float), -1)], 2e-6)
    assert not found[2].any()


def seen_by(T: int, S: int, offset: int, window: int) -> np.ndarray:
    queries, keys = np.arange(T)[:, None] + offset, np.arange(S)
    return (keys <= queries) & (keys > queries - window if window else True)


@pytest.mark.parametrize(
    ("H", "K", "T", "S", "d", "window", "offset"),
    [
        (6, 2, 37, 37, 10, 0, 0),
        (6, 3, 37, 50, 16, 9, 13),
        (4, 1, 150, 150, 20, 70, 0),
        (2, 2, 150, 350, 64, 33, 200),
        (3, 1, 100, 100, 100, 99, 0),
    ],
)
def test_grouped_heads_and_windows_with_gradients(both, H, K, T, S, d, window, offset):  # noqa: F811
    q, k, v = normal(2, H, T, d), normal(2, K, S, d, seed=1), normal(2, K, S, d, seed=2)
    dz, scale, n = normal(2, H, T, d, seed=3), d**-0.5, H // K
    seen = seen_by(T, S, offset, window)
    z, dq, dk, dv = attention64(q, k.repeat(n, 1), v.repeat(n, 1), dz, scale, seen)
    expected = [z, dq, *(g.reshape(2, K, n, S, d).sum(2) for g in (dk, dv))]
    tensors = [Tensor(t) for t in (q, k, v)]
    found = results(ops.attention(*tensors, scale, offset, window=window), dz, *tensors)
    assert_all_close(found, expected, 4e-6)


@pytest.mark.parametrize(
    ("H", "K", "T", "S", "d", "window", "positions"),
    [
        (6, 2, 1, 64, 10, 0, [3, 40]),
        (6, 3, 3, 64, 16, 9, [3, 40]),
        (9, 3, 1, 300, 64, 100, [0, 250]),
        (4, 1, 37, 200, 20, 20, [100, 7]),
        (16, 1, 1, 64, 20, 20, [5, 60]),  # more heads for a key than the registers hold
    ],
)
def test_grouped_heads_and_windows_in_a_cache(both, H, K, T, S, d, window, positions):  # noqa: F811
    q, k, v = normal(2, H, T, d), normal(2, K, T, d, seed=1), normal(2, K, T, d, seed=2)
    keys, values = normal(2, K, S, d, seed=3), normal(2, K, S, d, seed=4)
    caches = [Tensor(t).realize() for t in (keys, values)]
    places = Tensor(positions, dtype=dtypes.int32).realize()
    z = ops.attention_in_cache(*(Tensor(t).realize() for t in (q, k, v)), *caches, places, None, 0.3, window)
    found, n = z.numpy(), H // K
    for b, at in enumerate(positions):
        keys[b, :, at : at + T], values[b, :, at : at + T] = k[b], v[b]
        one = [t[b : b + 1].repeat(n, 1) for t in (keys, values)]
        seen = seen_by(T, S, at, window)
        expected = attention64(q[b : b + 1], *one, np.zeros((1, H, T, d)), 0.3, seen)[0]
        assert_all_close([found[b : b + 1]], [expected], 4e-6)
    for cache, wanted in zip(caches, (keys, values), strict=True):
        np.testing.assert_array_equal(cache.numpy(), wanted)


def test_frequencies_of_llama_3():
    """Grattafiori et al. 2024: fast frequencies stay, slow ones are divided, between them a mixture."""
    plain, scaled = Rope(64, 5e5).frequencies(), Rope(64, 5e5, (32.0, 1.0, 4.0, 8192.0)).frequencies()
    periods = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[periods > 4], plain[periods > 4])
    np.testing.assert_allclose(scaled[periods < 1], plain[periods < 1] / 32, rtol=1e-6)
    between = (periods > 1) & (periods < 4)
    share = (periods[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], plain[between] * (share + (1 - share) / 32), rtol=1e-5)
    np.testing.assert_allclose(Rope(8, 100.0, (4.0,)).frequencies(), Rope(8, 100.0).frequencies() / 4)
