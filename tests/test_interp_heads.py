"""Head scores on patterns and models that were made by hand, and on random ones against the full matrices."""

import numpy as np
import pytest
from helpers import SMALL, fill, layer_norm, under
from tinygrad import Tensor

from lama.errors import LamaError
from lama.interp.circuits import embedding_matrix, head_weights, unembedding_matrix
from lama.interp.heads import (
    composition,
    copying_score,
    duplicate_token_score,
    head_scores,
    induction_score,
    match,
    previous_token_score,
    repeated_tokens,
)
from lama.interp.interventions import Removal, ablate, patch
from lama.models.gpt import GPT, GPTConfig

PREVIOUS = np.array(
    [[1, 0, 0, 0, 0], [0.75, 0.25, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0.25, 0, 0.75, 0, 0], [0, 0, 0, 1, 0]]
)
REPEATED = np.array([9, 4, 7, 4, 7])  # [BOS] r r


def put(tensor: Tensor, values: np.ndarray) -> None:
    tensor.assign(Tensor(values.astype(np.float32))).realize()


def previous_token_model(head: int) -> GPT:
    """One layer in which this head of three looks at the token before, and nothing else is done: positions
    stand on a circle, and its queries are turned back by one place."""
    n, strength = 17, 900.0
    model = GPT(
        GPTConfig(
            vocab_size=11,
            context_length=n,
            d_model=6,
            n_layers=1,
            n_heads=3,
            d_mlp=1,
            bias=False,
            norm="none",
        )
    )
    angles = 2 * np.pi * np.arange(n) / n
    step = angles[1]
    back = np.array([[np.cos(step), np.sin(step)], [-np.sin(step), np.cos(step)]])
    qkv = np.zeros((3, 3, 2, 6))  # q, k, v; heads; d_head; d_model
    qkv[0, head, :, :2], qkv[1, head, :, :2] = strength * back, np.eye(2)
    put(model.embed.weight, np.zeros((11, 6)))
    put(model.pos_embed.weight, np.pad(np.stack([np.cos(angles), np.sin(angles)], -1), ((0, 0), (0, 4))))
    put(model.blocks[0].attn.qkv.weight, qkv.reshape(18, 6))
    return model


def test_previous_token_score_is_the_mean_of_the_diagonal_below():
    assert previous_token_score(PREVIOUS) == pytest.approx((0.75 + 0.5 + 0.75 + 1) / 4)
    # The first query has nothing before it.
    assert previous_token_score(PREVIOUS, "mul") == pytest.approx((0.75 + 0.5 + 0.75 + 1) / 5)
    assert previous_token_score(PREVIOUS, "abs") == pytest.approx(1 - (1 + 0.5 + 1 + 0.5 + 0) / 5)


def test_duplicate_token_score_is_what_goes_to_earlier_equal_tokens():
    pattern = np.zeros((5, 5))
    pattern[3, 1], pattern[4, 2], pattern[4, 4], pattern[2, 0] = 0.5, 0.25, 0.75, 1
    # Queries 3 and 4 have an earlier equal token.
    assert duplicate_token_score(pattern, REPEATED) == pytest.approx(0.75 / 1.5)
    assert duplicate_token_score(pattern, REPEATED, "mul") == pytest.approx(0.75 / 2.5)


def test_induction_score_is_what_goes_behind_earlier_equal_tokens():
    pattern = np.eye(5)
    pattern[3] = [0, 0, 1, 0, 0]  # 4 looks at what came after 4
    pattern[4] = [0, 0.5, 0, 0.25, 0.25]  # 7 looks at what came after 7 with a quarter
    assert induction_score(pattern, REPEATED) == pytest.approx((1 + 0.25) / 2)
    assert induction_score(pattern, REPEATED, "mul") == pytest.approx((1 + 0.25) / 5)
    assert induction_score(pattern, REPEATED, "abs") == pytest.approx(1 - (3 + 0 + 1.5) / 5)
    assert duplicate_token_score(pattern, REPEATED) == 0


def test_scores_are_those_of_the_diagonals_of_repeated_tokens():
    length = 5
    (tokens,) = repeated_tokens(1, length, vocab_size=31, begin=30, seed=2)
    T = 2 * length + 1
    pattern = np.random.default_rng(1).random((2, 3, T, T)) * np.tri(T)
    pattern /= pattern.sum(-1, keepdims=True)
    for score, offset in (
        (previous_token_score(pattern), -1),
        (duplicate_token_score(pattern, tokens), -length),
        (induction_score(pattern, tokens), -(length - 1)),
    ):
        diagonal = np.diagonal(pattern, offset, -2, -1)
        of_second_copy = diagonal if offset == -1 else diagonal[..., -length:]
        np.testing.assert_allclose(score, of_second_copy.mean(-1), rtol=1e-12)


def test_a_score_of_tokens_without_repetition_is_zero():
    assert duplicate_token_score(PREVIOUS, np.arange(5)) == induction_score(PREVIOUS, np.arange(5)) == 0
    with pytest.raises(ValueError, match="measure must be one of mass, mul, abs; got 'max'"):
        match(PREVIOUS, np.eye(5), "max")


def test_repeated_tokens_are_different_ones_twice():
    tokens = repeated_tokens(3, 7, vocab_size=8, begin=2, seed=5)
    assert tokens.shape == (3, 15) and (tokens[:, 0] == 2).all()
    np.testing.assert_array_equal(tokens[:, 1:8], tokens[:, 8:])
    assert [sorted(row) for row in tokens[:, 1:8].tolist()] == [[0, 1, 3, 4, 5, 6, 7]] * 3
    assert len({tuple(row) for row in tokens.tolist()}) == 3
    np.testing.assert_array_equal(tokens, repeated_tokens(3, 7, vocab_size=8, begin=2, seed=5))
    assert repeated_tokens(2, 7, vocab_size=3).shape == (2, 14)  # fewer than that there are: some come twice


@pytest.mark.parametrize("head", [0, 2])
def test_the_head_that_looks_at_the_token_before_is_found(head):
    scores = head_scores(previous_token_model(head), length=8, n=2, begin=3)
    assert scores.previous_token[0, head] == pytest.approx(1, abs=1e-6)
    others = [h for h in range(3) if h != head]
    assert (scores.previous_token[0, others] < 0.5).all()  # they look at all tokens alike
    assert scores.induction[0, head] == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(scores.copying, np.zeros((1, 3)))  # its heads write nothing


def test_copying_is_one_for_a_head_that_copies_and_minus_one_for_one_that_forbids():
    model = GPT(
        GPTConfig(vocab_size=7, context_length=5, d_model=6, n_layers=1, n_heads=3, d_mlp=1, norm="none")
    )
    fill(model)
    values = model.blocks[0].attn.qkv.weight.numpy()[12:].reshape(3, 2, 6)
    put(
        model.blocks[0].attn.out.weight,
        np.concatenate([values[0], -values[1], np.roll(values[2], 1, axis=1)]).T,
    )
    copies, forbids, other = copying_score(model)[0]
    assert (copies, forbids) == (pytest.approx(1), pytest.approx(-1))
    assert abs(other) < 0.99


@pytest.fixture(
    scope="module", params=[{}, {"norm": "none"}, {"similarity": "general"}, {"tied": False}], ids=str
)
def model(request):
    model = GPT(GPTConfig(**SMALL, **request.param))
    fill(model, seed=3)
    return model


def test_copying_is_that_of_the_full_circuit(model):
    heads, W_E, W_U = head_weights(model), embedding_matrix(model), unembedding_matrix(model)
    for layer in range(2):
        for head in range(3):
            values = np.linalg.eigvals(
                (W_E @ heads.value[layer, head] @ heads.output[layer, head] @ W_U).astype(float)
            )
            assert copying_score(model)[layer, head] == pytest.approx(
                values.sum().real / np.abs(values).sum(), abs=1e-4
            )


def test_composition_is_that_of_the_full_matrices(model):
    heads, norm = head_weights(model), np.linalg.norm
    for kind in "qkv":
        scores = composition(model, kind)
        assert (scores[1] == 0).all() and (scores[:, :, 0] == 0).all()
        for first in range(3):
            for second in range(3):
                written = heads.value[0, first] @ heads.output[0, first]
                qk = heads.query[1, second] @ heads.key[1, second].T
                read = {"q": qk, "k": qk.T, "v": heads.value[1, second] @ heads.output[1, second]}[kind]
                expected = norm(written @ read) / norm(written) / norm(read)
                assert scores[0, first, 1, second] == pytest.approx(expected, rel=1e-4)


def test_folded_weights_read_from_the_stream_what_the_norm_and_the_weights_do():
    model = GPT(GPTConfig(**SMALL))
    values = fill(model)
    x = np.random.default_rng(0).standard_normal((7, 6)) * 3 + 1
    scaled = x / x.std(-1, keepdims=True)
    ln1 = under("blocks.1.ln1", values)
    weight = values["blocks.1.attn.qkv.weight"][12:]  # values
    plain = layer_norm(x, ln1, 0) @ weight.T - ln1["bias"] @ weight.T
    np.testing.assert_allclose(
        scaled @ head_weights(model).value[1].transpose(1, 0, 2).reshape(6, 6), plain, atol=1e-5
    )
    ln_final = under("ln_final", values)
    logits = (
        layer_norm(x, ln_final, 0) @ values["embed.weight"].T - ln_final["bias"] @ values["embed.weight"].T
    )
    np.testing.assert_allclose(
        scaled @ unembedding_matrix(model), logits - logits.mean(-1, keepdims=True), atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "got"), [({"norm": "post"}, "norm=post"), ({"residual": False}, "residual=False")]
)
def test_weights_are_refused_where_outputs_do_not_add_up(changes, got):
    model = GPT(GPTConfig(**SMALL, **changes))
    with pytest.raises(
        LamaError, match=f"heads' outputs must add up in the stream, .*; got a model with {got}"
    ):
        copying_score(model)
    scores = head_scores(model, length=5, n=2)
    assert scores.copying is None and scores.induction.shape == (2, 3)


def test_composition_refuses_other_kinds_and_scores_that_are_no_product():
    model = GPT(GPTConfig(**SMALL, similarity="additive"))
    with pytest.raises(LamaError, match="need scores that are products of q and k; got similarity=additive"):
        composition(model, "k")
    assert composition(model, "v").shape == (2, 3, 2, 3)
    with pytest.raises(ValueError, match="kind must be one of q, k, v; got 'o'"):
        composition(model, "o")


def test_a_model_without_layers_has_no_heads():
    model = GPT(GPTConfig(**{**SMALL, "n_layers": 0}))
    assert copying_score(model).shape == (0, 3) and composition(model, "q").shape == (0, 3, 0, 3)
    for look in (
        lambda: head_scores(model, 5),
        lambda: ablate(model, [1, 2], [Removal()]),
        lambda: patch(model, [1, 2], [3, 2], 4, 5),
    ):
        with pytest.raises(LamaError, match="the model must have layers; got n_layers=0"):
            look()
