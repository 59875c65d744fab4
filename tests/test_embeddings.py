"""Tokens and positions as vectors, and vectors as logits."""

import math

import numpy as np
import pytest
from helpers import fill, normal
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.embeddings import (
    LearnedPositions,
    SinusoidalPositions,
    TokenEmbedding,
    make_positions,
    sinusoids,
    unembedding,
)
from lama.models.gpt import GPT, GPTConfig
from lama.models.registry import n_parameters

# --- positions


def test_sinusoids_are_the_exact_values():
    expected = [[0, 1, 0, 1], [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]]
    table = sinusoids(3, 4)
    np.testing.assert_allclose(table[:2], expected, rtol=1e-6)
    assert table[2, 3] == pytest.approx(math.cos(2 / 10000 ** (2 / 4)))


def test_sinusoids_are_different_at_every_position():
    table = sinusoids(512, 64)
    assert np.isfinite(table).all()
    assert len(np.unique(table, axis=0)) == 512


def test_sinusoids_turn_by_the_same_angle_wherever_they_start():
    table, shift = sinusoids(11, 4), 2
    for i, frequency in enumerate((1, 0.01)):
        c, s = math.cos(shift * frequency), math.sin(shift * frequency)
        pairs = table[:, 2 * i : 2 * i + 2]  # (sin, cos)
        np.testing.assert_allclose(pairs[shift:], pairs[:-shift] @ np.array([[c, -s], [s, c]]), atol=1e-6)


@pytest.mark.parametrize("d_model", [6, 7])
def test_sinusoidal_positions_are_rows_of_the_table(d_model):
    positions = SinusoidalPositions(101, d_model)
    np.testing.assert_array_equal(positions(5).numpy(), sinusoids(5, d_model))
    np.testing.assert_array_equal(
        positions(3, Tensor([97], dtype="int32")).numpy()[0], sinusoids(100, d_model)[97:]
    )
    assert not get_state_dict(positions)


def test_learned_positions_are_rows_of_the_weight():
    positions = LearnedPositions(11, 3)
    weight = fill(positions)["weight"]
    np.testing.assert_array_equal(
        positions(5, Tensor([4, 0], dtype="int32")).numpy(), [weight[4:9], weight[:5]]
    )


def test_positions_names_are_checked():
    assert isinstance(make_positions("learned", 5, 4), LearnedPositions)
    assert isinstance(make_positions("sinusoidal", 5, 4), SinusoidalPositions)
    with pytest.raises(ValueError, match="must be one of learned, sinusoidal, none; got 'rotary'"):
        make_positions("rotary", 5, 4)


# --- tokens


def test_token_embedding_picks_rows_and_unembeds_with_them():
    embedding = TokenEmbedding(7, 5)
    weight, x = fill(embedding)["weight"], normal(2, 3, 5)
    np.testing.assert_array_equal(
        embedding(Tensor([[6, 0, 3], [3, 3, 1]])).numpy(), weight[[[6, 0, 3], [3, 3, 1]]]
    )
    np.testing.assert_allclose(embedding.unembed(Tensor(x)).numpy(), x @ weight.T, atol=1e-5)


def test_unembedding_is_a_matrix_without_bias():
    assert {name: value.shape for name, value in fill(unembedding(5, 7)).items()} == {"weight": (7, 5)}


def test_tied_model_has_one_vocabulary_matrix_and_untied_two():
    config = {"vocab_size": 11, "context_length": 5, "d_model": 6, "n_layers": 1, "n_heads": 2}
    tied, untied = GPT(GPTConfig(**config)), GPT(GPTConfig(**config, tied=False))
    assert n_parameters(untied) - n_parameters(tied) == 11 * 6
    x = Tensor(normal(1, 2, 6))
    np.testing.assert_array_equal(tied.logits(x).numpy(), tied.embed.unembed(x).numpy())
    assert np.abs(untied.logits(x).numpy() - untied.embed.unembed(x).numpy()).max() > 1e-3
