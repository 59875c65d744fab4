"""Attention against numbers worked out by hand and formulas in numpy."""

import math

import numpy as np
import pytest
from helpers import fill, linear, multi_head, normal, score, softmax, under
from tinygrad import Tensor

from lama.attention import (
    SIMILARITIES,
    Additive,
    MultiHeadAttention,
    SingleHeadAttention,
    attention,
    make_similarity,
)
from lama.masks import causal_mask, padding_mask
from lama.taps import Recorder

B, T, S, H, D_HEAD = 2, 5, 7, 3, 4
D_MODEL = H * D_HEAD


# --- the function


def test_attention_equals_the_hand_computed_case():
    q, k, v = Tensor([[1.0, 2], [3, 4]]), Tensor([[5.0, 6], [7, 8]]), Tensor([[9.0, 10], [11, 12]])
    # Query 1 scores 39/√2 and 53/√2; query 0 sees key 0 alone.
    second = 1 / (1 + math.exp(-(53 - 39) / math.sqrt(2)))
    expected = [[9, 10], [9 + 2 * second, 10 + 2 * second]]
    np.testing.assert_allclose(attention(q, k, v, causal_mask(2, 2)).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarity_equals_its_formula(name):
    similarity = make_similarity(name, H, D_HEAD)
    parameters = fill(similarity)
    q, k = normal(B, H, T, D_HEAD), normal(B, H, S, D_HEAD)
    expected = [[score(name, q[b, h], k[b, h], parameters, h) for h in range(H)] for b in range(B)]
    np.testing.assert_allclose(similarity(Tensor(q), Tensor(k)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("dot", {}),
        ("scaled_dot", {}),
        ("general", {"weight": (H, D_HEAD, D_HEAD)}),
        ("additive", {"query_weight": (H, D_HEAD, 1), "key_weight": (H, D_HEAD, 1)}),
    ],
)
def test_similarity_parameters_are_those_of_the_formula(name, shapes):
    assert {key: value.shape for key, value in fill(make_similarity(name, H, D_HEAD)).items()} == shapes


def test_similarity_names_are_checked():
    with pytest.raises(ValueError, match="one of dot, scaled_dot, general, additive; got 'cosine'"):
        make_similarity("cosine", H, D_HEAD)


def test_additive_attention_ignores_the_query():
    similarity, record = make_similarity("additive", H, D_HEAD), Recorder("pattern")
    fill(similarity)
    q, k = Tensor(normal(B, H, T, D_HEAD)), Tensor(normal(B, H, S, D_HEAD))
    attention(q, k, k, similarity=similarity, tap=record)
    pattern = record["pattern"].numpy()
    np.testing.assert_allclose(pattern, np.broadcast_to(pattern[:, :, :1], pattern.shape), atol=1e-6)
    assert pattern.std(-1).min() > 0.01  # and it does prefer some keys


def test_additive_attention_teaches_its_keys_and_not_its_queries():
    similarity = Additive(H, D_HEAD)
    fill(similarity)
    q, k = Tensor(normal(B, H, T, D_HEAD)), Tensor(normal(B, H, S, D_HEAD))
    loss = attention(q, k, k, similarity=similarity).square().sum()
    query, key = loss.gradient(similarity.query_weight, similarity.key_weight)
    assert np.abs(query.numpy()).max() < 1e-5
    assert np.abs(key.numpy()).min() > 1e-2


def test_attention_gives_hidden_keys_no_weight():
    q, k, v = (
        Tensor(normal(B, H, T, D_HEAD)),
        Tensor(normal(B, H, S, D_HEAD)),
        Tensor(normal(B, H, S, D_HEAD + 1)),
    )
    mask, record = normal(T, S) > 0, Recorder("pattern")
    mask[:, 0] = True
    z = attention(q, k, v, Tensor(mask), tap=record)
    pattern = record["pattern"].numpy()
    assert z.shape == (B, H, T, D_HEAD + 1)
    assert (pattern[..., ~mask] == 0).all() and (pattern[..., mask] > 0).all()
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(z.numpy(), pattern @ v.numpy(), atol=1e-5)


def test_attention_that_sees_nothing_is_the_mean_and_not_nan():
    v = normal(1, S, D_HEAD)
    z = attention(
        Tensor(normal(1, T, D_HEAD)), Tensor(normal(1, S, D_HEAD)), Tensor(v), Tensor(np.zeros((T, S), bool))
    )
    np.testing.assert_allclose(z.numpy(), np.broadcast_to(v.mean(1, keepdims=True), z.shape), atol=1e-6)


# --- the layers


def test_single_head_attention_equals_numpy():
    head = SingleHeadAttention(D_MODEL, D_HEAD)
    p, x = fill(head), normal(B, T, D_MODEL)
    q, k, v = (linear(x, under(name, p)) for name in "qkv")
    scores = np.where(np.tril(np.ones((T, T), bool)), q @ k.transpose(0, 2, 1) / math.sqrt(D_HEAD), -np.inf)
    z = head(Tensor(x), causal_mask(T, T))
    assert z.shape == (B, T, D_HEAD)
    np.testing.assert_allclose(z.numpy(), softmax(scores) @ v, atol=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_multi_head_attention_equals_its_heads_one_by_one(similarity):
    layer = MultiHeadAttention(D_MODEL, H, similarity=make_similarity(similarity, H, D_MODEL // H))
    p, x = fill(layer), normal(B, T, D_MODEL)
    expected = multi_head(x, p, H, np.tril(np.ones((T, T), bool)), similarity=similarity)
    np.testing.assert_allclose(layer(Tensor(x), causal_mask(T, T)).numpy(), expected, atol=1e-4)


def test_multi_head_attention_without_bias_has_none():
    assert list(fill(MultiHeadAttention(D_MODEL, H, bias=False))) == ["qkv.weight", "out.weight"]


def test_multi_head_attention_refuses_heads_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"^d_model must be a multiple of n_heads; got d_model=30, n_heads=4$"
    ):
        MultiHeadAttention(30, 4)


def test_every_head_reads_every_feature():
    layer = MultiHeadAttention(D_MODEL, H)
    fill(layer)
    x = np.repeat(normal(1, T, D_MODEL), D_MODEL + 1, axis=0)
    # Row i: another value in feature i of token 0; last row: as it was.
    x[np.arange(D_MODEL), 0, np.arange(D_MODEL)] += 1
    record = Recorder("z")
    layer(Tensor(x), tap=record)
    z = record["z"].numpy()  # (D_MODEL + 1, H, T, D_HEAD)
    assert (np.abs(z[:-1] - z[-1:]).max((2, 3)) > 1e-4).all()


def test_cross_attention_equals_numpy():
    layer = MultiHeadAttention(D_MODEL, H)
    p, x, memory = fill(layer), normal(B, T, D_MODEL), normal(B, S, D_MODEL, seed=1)
    expected = multi_head(x, p, H, memory=memory)
    np.testing.assert_allclose(layer(Tensor(x), memory=Tensor(memory)).numpy(), expected, atol=1e-4)


def test_cross_attention_reaches_the_last_source_token_from_the_first_target():
    layer = MultiHeadAttention(D_MODEL, H)
    fill(layer)
    x, memory = Tensor(normal(B, T, D_MODEL)), normal(B, S, D_MODEL, seed=1)
    before = layer(x, memory=Tensor(memory)).numpy()
    memory[:, -1] += 1
    after = layer(x, memory=Tensor(memory)).numpy()
    assert (np.abs(after - before).max(-1) > 1e-4).all()


def test_cross_attention_ignores_source_padding():
    layer = MultiHeadAttention(D_MODEL, H)
    fill(layer)
    x, memory = Tensor(normal(B, T, D_MODEL)), normal(B, S, D_MODEL, seed=1)
    mask = padding_mask(Tensor([[1, 2, 3, 4, 5, 0, 0]] * B), pad=0)
    before = layer(x, mask, memory=Tensor(memory)).numpy()
    memory[:, 5:] = 100
    np.testing.assert_array_equal(layer(x, mask, memory=Tensor(memory)).numpy(), before)
    short = layer(x, memory=Tensor(memory[:, :5].copy())).numpy()
    np.testing.assert_allclose(before, short, atol=1e-5)
