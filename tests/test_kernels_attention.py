"""Attention without a matrix of scores: against the formula in numpy and against its plain twin, wherever q,
k and v lie.
"""

import math

import numpy as np
import pytest
from helpers import SMALL, normal
from test_kernels import assert_all_close, both, needs_c, ran, results  # noqa: F401  (fixtures)
from tinygrad import Tensor, dtypes

from lama import kernels, ops
from lama.attention import attention, dot, scaled_dot
from lama.dropout import Dropout, no_dropout
from lama.masks import Causal, causal_mask, padding_mask
from lama.models.gpt import GPT, GPTConfig
from lama.runtime import kernel as program
from lama.runtime import strides as views

# B, H, T, S, d, e: no two alike, and each kind of tail; blocks of keys and queries, and the first and the
# last of them alone
SHAPES = [
    (2, 3, 5, 7, 4, 6),
    (1, 2, 61, 37, 16, 17),
    (3, 1, 131, 307, 33, 64),
    (2, 1, 50, 290, 128, 80),
    (1, 1, 1, 1, 1, 1),
]


def attention64(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dz: np.ndarray,
    scale: float,
    seen: np.ndarray | bool = True,
    kept: np.ndarray | float = 1.0,
) -> list[np.ndarray]:
    """z, dq, dk, dv; `kept` is what the pattern is multiplied by."""
    q, k, v, dz = (x.astype(float) for x in (q, k, v, dz))
    scores = np.where(seen, q @ k.swapaxes(-2, -1) * scale, -3.4e38)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dz @ v.swapaxes(-2, -1) * kept
    ds = np.where(seen, p * (dp - (dp * p).sum(-1, keepdims=True)), 0) * scale
    return [(p * kept) @ v, ds @ k, ds.swapaxes(-2, -1) @ q, (p * kept).swapaxes(-2, -1) @ dz]


def four(B: int, H: int, T: int, S: int, d: int, e: int) -> list[np.ndarray]:
    """q, k, v and the gradient of z."""
    return [
        normal(B, H, T, d),
        normal(B, H, S, d, seed=1),
        normal(B, H, S, e, seed=2),
        normal(B, H, T, e, seed=3),
    ]


def key_of(number: int, row: int = 0) -> Tensor:
    return Tensor([number, row], dtype=dtypes.uint32).realize()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("similarity", [dot, scaled_dot])
def test_attention_and_its_gradients_equal_the_formula(both, shape, similarity):  # noqa: F811
    *inputs, dz = four(*shape)
    scale = 1.0 if similarity is dot else 1 / math.sqrt(shape[4])
    # Scores of unit variance, or float32 has few digits left of them.
    inputs[0] /= np.float32(scale * math.sqrt(shape[4]))
    tensors = [Tensor(x) for x in inputs]
    assert_all_close(
        results(attention(*tensors, similarity=similarity), dz, *tensors),
        attention64(*inputs, dz, scale),
        3e-6,
    )


@pytest.mark.parametrize("offset", [0, 3, 150])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention_and_its_gradients_equal_the_formula(both, shape, offset):  # noqa: F811
    *inputs, dz = four(*shape)
    tensors = [Tensor(x) for x in inputs]
    seen = np.tril(np.ones((shape[2], shape[3]), bool), offset)
    expected = attention64(*inputs, dz, 1 / math.sqrt(shape[4]), seen)
    assert_all_close(results(attention(*tensors, Causal(offset)), dz, *tensors), expected, 3e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_hides_padding_and_a_query_that_sees_nothing_gets_the_mean(both, causal, rows):  # noqa: F811
    shape = (3, 2, 131, 307, 33, 7)
    *inputs, dz = four(*shape)
    tensors = [Tensor(x) for x in inputs]
    visible = normal(rows, 1, 1, 307) > 0
    visible[0, ..., :11] = False  # with the causal mask the first rows see nothing at all
    if rows == 3:
        visible[1] = False
    mask = Causal(2) & Tensor(visible) if causal else Tensor(visible)
    seen = visible & (np.tril(np.ones((131, 307), bool), 2) if causal else True)
    expected = attention64(*inputs, dz, 1 / math.sqrt(33), seen)
    ours = results(attention(*tensors, mask), dz, *tensors)
    assert_all_close(ours, expected, 3e-6)
    if rows == 3:
        np.testing.assert_allclose(
            ours[0][1], np.broadcast_to(inputs[2][1].mean(-2, keepdims=True), ours[0][1].shape), atol=1e-6
        )


@needs_c
@pytest.mark.parametrize("dtype", [dtypes.int32, dtypes.uint8])
def test_padding_of_any_numbers_hides_what_is_0(dtype):
    q, k, v, _ = (Tensor(x) for x in four(1, 2, 3, 5, 7, 7))
    padding = Tensor([[[[1, 3, 0, 255, 1]]]], dtype=dtype)
    found, expected = (ops.attention(q, k, v, 0.5, None, mask).numpy() for mask in (padding, padding != 0))
    np.testing.assert_array_equal(found, expected)


@needs_c
@pytest.mark.parametrize(
    ("k", "v"), [((5, 4), (5, 8)), ((4, 8), (7, 8))], ids=["keys' width", "as many values as keys"]
)
def test_sizes_that_disagree_are_not_the_kernel_s(k, v):
    tensors = [Tensor(normal(1, 1, *shape)) for shape in ((5, 8), k, v)]
    assert (
        kernels.attention(tensors[0], tensors[0], tensors[0], 1.0) is not None
        and kernels.attention(*tensors, 1.0) is None
    )


@needs_c
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 4, 6), (3, 2, 131, 307, 33, 16)])
@pytest.mark.parametrize("mask", [None, Causal(170)], ids=["all", "causal"])
def test_attention_drops_what_dropout_of_the_pattern_drops(ran, shape, mask):  # noqa: F811
    *inputs, dz = four(*shape)
    tensors, dropout = [Tensor(x) for x in inputs], Dropout(0.3, key_of(987654321, 5), "blocks.3.attn.")
    kept = dropout("pattern", Tensor.ones(shape[0], shape[1], shape[2], shape[3]).contiguous()).numpy()
    assert (kept == 0).any()
    ran.clear()
    ours = results(attention(*tensors, mask, dropout=dropout), dz, *tensors)
    assert [name.split("_")[1] for name in ran] == ["attention", "attention"]
    seen = True if mask is None else np.tril(np.ones(shape[2:4], bool), 170)
    assert_all_close(ours, attention64(*inputs, dz, 1 / math.sqrt(shape[4]), seen, kept), 3e-6)


@pytest.mark.parametrize(
    "layout",
    ["q k v of one product", "heads first", "keys and values of one product", "all the same", "overlapping"],
)
@pytest.mark.parametrize("dropout", [no_dropout, Dropout(0.25, key_of(3), "a.")], ids=["", "dropout"])
def test_attention_reads_views_where_they_lie_and_its_gradients_come_back_there(
    both,  # noqa: F811
    layout,
    dropout,
    monkeypatch,
):
    B, H, T, d = 2, 3, 19, 5
    if layout == "q k v of one product":
        leaves = [Tensor(normal(B, T, 3 * H * d))]
        q, k, v = (t.reshape(B, T, H, d).transpose(1, 2) for t in leaves[0].chunk(3, dim=-1))
    elif layout == "heads first":
        leaves = [Tensor(normal(H, 3, B, T, d))]
        q, k, v = (leaves[0][:, i].transpose(0, 1) for i in range(3))
    elif layout == "keys and values of one product":
        leaves = [Tensor(normal(B, T, H * d)), Tensor(normal(B, T, 2 * H * d, seed=1))]
        q, k, v = (t.reshape(B, T, H, d).transpose(1, 2) for t in (leaves[0], *leaves[1].chunk(2, dim=-1)))
    elif layout == "all the same":
        leaves = [Tensor(normal(B, H, T, d))]
        q = k = v = leaves[0]
    else:
        leaves = [Tensor(normal(B, H, T + 2, d))]
        q, k, v = (leaves[0][:, :, i : i + T] for i in range(3))
    dz = normal(B, H, T, d, seed=3)
    ours = results(attention(q, k, v, Causal(), dropout=dropout), dz, *leaves)
    monkeypatch.setattr(program, "_reference", lambda: True)
    copies = [t.contiguous().realize() for t in (q, k, v)]
    kept = dropout("pattern", Tensor.ones(B, H, T, T).contiguous()).numpy()
    expected = attention64(
        *(t.numpy() for t in copies), dz, 1 / math.sqrt(d), np.tril(np.ones((T, T), bool)), kept
    )
    assert_all_close(ours[:1], expected[:1], 3e-6)
    # The gradients of the copies, carried through the views by tinygrad.
    carried = Tensor.stack(
        *(
            (view * Tensor(g.astype(np.float32))).sum()
            for view, g in zip((q, k, v), expected[1:], strict=True)
        )
    ).sum()
    assert_all_close(ours[1:], [g.numpy() for g in carried.gradient(*leaves)], 3e-6)


@needs_c
def test_attention_of_a_product_copies_nothing(ran):  # noqa: F811
    B, T, H, d = 2, 7, 3, 5
    x, w, out, dy = (
        Tensor(normal(*shape)).realize() for shape in ((B, T, 11), (3 * H * d, 11), (11, H * d), (B, T, 11))
    )
    q, k, v = (
        t.reshape(B, T, H, d).transpose(1, 2) for t in ops.matmul(x, w, transpose_b=True).chunk(3, dim=-1)
    )
    z = attention(q, k, v, Causal()).transpose(1, 2).reshape(B, T, H * d)
    y = ops.matmul(views.materialise(z), out, transpose_b=True)
    (dw,) = y.gradient(w, gradient=dy)
    linear, _ = Tensor.linear_with_vars(y, dw)
    names = [call.src[0].arg.name for call in linear.src if hasattr(call.src[0].arg, "name")]
    assert len(names) == len(linear.src) and all(name.startswith("lama_") for name in names)
    assert len(names) == 6  # two products and attention, and their gradients


@needs_c
def test_attention_of_three_axes_is_that_of_one_head(ran):  # noqa: F811
    q, k, v, _ = four(3, 1, 5, 7, 4, 6)
    one = attention(Tensor(q[:, 0]), Tensor(k[:, 0]), Tensor(v[:, 0]), Causal(2))
    assert one.shape == (3, 5, 6)
    np.testing.assert_allclose(
        one.numpy(),
        attention64(q, k, v, normal(3, 1, 5, 6), 0.5, np.tril(np.ones((5, 7), bool), 2))[0][:, 0],
        atol=1e-6,
    )
    assert len(ran) == 1


def test_causal_mask_with_padding_is_the_two_masks_combined():
    tokens = Tensor([[5, 0, 4], [1, 2, 3]])
    padding = padding_mask(tokens, pad=0)
    np.testing.assert_array_equal(
        ((Causal(1) & padding) & padding).as_tensor(2, 3).numpy(), (causal_mask(2, 3, 1) & padding).numpy()
    )


# --- several texts in a row


def row_starts(B: int, T: int) -> np.ndarray:
    """Texts of different lengths in each row; the last row is one text."""
    starts = np.zeros((B, T), np.int32)
    rng = np.random.default_rng((B, T))
    for b in range(B - 1):
        borders = np.sort(rng.choice(T, size=min(T, 4), replace=False))
        starts[b] = np.maximum.accumulate(np.where(np.isin(np.arange(T), borders), np.arange(T), 0))
    return starts


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize(
    "shape", [(3, 2, 61, 61, 16, 17), (2, 4, 131, 131, 33, 64), (3, 1, 307, 307, 128, 80)]
)
def test_texts_of_a_row_do_not_see_each_other(both, shape, window):  # noqa: F811
    *inputs, dz = four(*shape)
    B, _H, T, S = shape[:4]
    starts = row_starts(B, T)
    tensors = [Tensor(x) for x in inputs]
    keys, queries = np.arange(S), np.arange(T)[:, None]
    seen = (keys <= queries) & (keys >= starts[:, None, :, None]) & (keys > queries - (window or S))
    z = attention(*tensors, Causal(starts=Tensor(starts)), window=window)
    expected = attention64(*inputs, dz, 1 / math.sqrt(shape[4]), seen)
    assert_all_close(results(z, dz, *tensors), expected, 3e-6)


def test_texts_of_a_row_with_shared_heads_and_dropout(both):  # noqa: F811
    B, H, K, T, d = 2, 6, 2, 100, 8
    q, k, v, dz = (
        normal(B, H, T, d),
        normal(B, K, T, d, seed=1),
        normal(B, K, T, d, seed=2),
        normal(B, H, T, d),
    )
    starts, dropout = row_starts(B, T), Dropout(0.3, key_of(77, 2), "a.")
    kept = dropout("pattern", Tensor.ones(B, H, T, T).contiguous()).numpy()
    tensors = [Tensor(x) for x in (q, k, v)]
    z = attention(*tensors, Causal(starts=Tensor(starts)), dropout=dropout)
    seen = np.tril(np.ones((T, T), bool)) & (np.arange(T) >= starts[:, None, :, None])
    wide = [np.repeat(x, H // K, axis=1) for x in (k, v)]
    zs, dq, *others = attention64(q, *wide, dz, 1 / math.sqrt(d), seen, kept)
    summed = [x.reshape(B, K, H // K, T, d).sum(2) for x in others]
    assert_all_close(results(z, dz, *tensors), [zs, dq, *summed], 3e-6)


@needs_c
def test_texts_of_a_row_take_the_kernel_and_wrong_starts_stay_in_the_row(ran):  # noqa: F811
    tensors = [Tensor(x) for x in four(1, 1, 40, 40, 8, 8)[:3]]
    wild = np.random.default_rng(0).integers(-(2**31), 2**31 - 1, size=(1, 40), dtype=np.int32)
    assert np.isfinite(attention(*tensors, Causal(starts=Tensor(wild))).numpy()).all()
    assert [name.split("_")[1] for name in ran] == ["attention"]


# --- with a cache


@needs_c
@pytest.mark.parametrize(
    "dtype", [dtypes.float32, dtypes.float16, dtypes.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize(
    ("B", "H", "T", "S", "d", "position"),
    [
        (2, 3, 1, 13, 5, 7),
        (1, 3, 1, 307, 64, 277),
        (3, 2, 4, 13, 18, 9),
        (1, 2, 5, 307, 33, 200),
        (1, 1, 131, 307, 32, 0),
        (1, 3, 2, 5, 16, 0),
    ],
)
@pytest.mark.parametrize("in_rows", [False, True], ids=["row by row", "rows as data"])
def test_cached_attention_stores_its_keys_and_looks_at_all_before(
    ran,  # noqa: F811
    B,
    H,
    T,
    S,
    d,
    position,
    dtype,
    in_rows,
):
    caches = [Tensor(normal(B, H, S, d, seed=seed)).cast(dtype).contiguous().realize() for seed in (1, 2)]
    before = [cache.float().numpy() for cache in caches]
    q, k, v = (
        t.reshape(B, T, H, d).transpose(1, 2)
        for t in Tensor(normal(B, T, 3 * H * d)).realize().chunk(3, dim=-1)
    )
    new = [t.contiguous().cast(dtype).contiguous().float().numpy() for t in (k, v)]
    # Each row of the batch has its own.
    starts = np.array([max(0, position - 2 * b) for b in range(B)], np.int32)
    order = (
        np.random.default_rng(B).permutation(B).astype(np.int32) if in_rows else np.arange(B, dtype=np.int32)
    )
    positions, rows = Tensor(starts).realize(), Tensor(order).realize() if in_rows else None
    ran.clear()
    z = kernels.attention_in_cache(q, k, v, *caches, positions, rows, 0.3).numpy()
    assert len(ran) == 1
    for b, (start, row) in enumerate(zip(starts, order, strict=True)):
        for old, added in zip(before, new, strict=True):
            old[row, :, start : start + T] = added[b]
        keys, values = (old[row : row + 1, :, : start + T] for old in before)
        seen = np.tril(np.ones((T, start + T), bool), start)
        expected = attention64(
            q.contiguous().numpy()[b : b + 1], keys, values, np.zeros((1, H, T, d)), 0.3, seen
        )[:1]
        assert_all_close([z[b : b + 1]], expected, 3e-6)
    for cache, old in zip(caches, before, strict=True):
        np.testing.assert_array_equal(cache.float().numpy(), old)


@needs_c
@pytest.mark.parametrize("position", [-1, 12, 2**31 - 1])
def test_cached_attention_stays_within_the_cache(position):
    caches = [Tensor.zeros(1, 1, 13, 5).contiguous().realize() for _ in range(2)]
    new = Tensor(normal(1, 1, 2, 5)).realize()
    kernels.attention_in_cache(
        new, new, new, *caches, Tensor([position], dtype=dtypes.int32).realize(), None, 1.0
    ).realize()
    start = 0 if position < 0 else 11
    np.testing.assert_array_equal(caches[0].numpy()[:, :, start : start + 2], new.numpy())
    assert (np.delete(caches[1].numpy(), [start, start + 1], axis=2) == 0).all()


@needs_c
@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_is_kernels_and_nothing_else(batch):
    model = GPT(GPTConfig(**SMALL))
    cache, tokens = model.new_cache(batch), Tensor.ones(batch, 1, dtype=dtypes.int32).contiguous().realize()
    for _ in range(2):
        linear, _ = Tensor.linear_with_vars(model(tokens, cache))
        names = [call.src[0].arg.name for call in linear.src]
        cache.advance(1)
    assert [name for name in names if not name.startswith("lama_")] == []
    assert len([name for name in names if name.startswith("lama_attention_step_")]) == SMALL["n_layers"]


# --- where a tensor lies


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (lambda x: x, ((4, 6, 10), 0, (60, 10, 1))),
        (lambda x: x.reshape(24, 10).transpose(0, 1), ((10, 24), 0, (1, 10))),
        (lambda x: x[1:, :, 5:].reshape(3, 6, 5, 1), ((3, 6, 5, 1), 65, (60, 10, 1, 0))),
        (lambda x: x.transpose(0, 1)[2], ((4, 10), 20, (60, 1))),
        (lambda x: x[:, :, 2:3].expand(4, 6, 7), ((4, 6, 7), 2, (60, 10, 0))),
        (lambda x: x[:, :, :4].reshape(24, 2, 2), ((24, 2, 2), 0, (10, 2, 1))),
    ],
)
def test_views_lie_where_numpy_says(change, layout):
    x = Tensor(normal(4, 6, 10)).realize()
    base, found = views.strided_view(change(x))
    assert base.uop.base is x.uop.base and (found.shape, found.offset, found.strides) == layout
    flat = x.numpy().ravel()
    places = found.offset + sum(np.indices(found.shape)[i] * stride for i, stride in enumerate(found.strides))
    np.testing.assert_array_equal(flat[places], change(x).numpy())


@pytest.mark.parametrize(
    "change",
    [lambda x: x.transpose(0, 1).reshape(24, 10), lambda x: x[:, :, :4].reshape(6, 16), lambda x: x + 1],
)
def test_what_is_no_view_is_copied(change):
    x = Tensor(normal(4, 6, 10)).realize()
    base, found = views.strided_view(change(x))
    assert found == views.Layout(tuple(base.shape), 0, views.contiguous_strides(tuple(base.shape)))
    np.testing.assert_array_equal(base.numpy(), change(x).numpy())


def test_two_transpositions_need_no_copy():
    x = Tensor(normal(4, 6, 10)).realize()
    assert views.materialise(x.transpose(0, 1).transpose(0, 1).reshape(24, 10)).uop.base is x.uop.base
    assert views.materialise(x.transpose(0, 1)).uop.base is not x.uop.base
