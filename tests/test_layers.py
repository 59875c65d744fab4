"""Linear layers and norms against numpy, and how weights start."""

import math

import numpy as np
import pytest
from helpers import ACTIVATIONS, fill, layer_norm, linear, normal
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama import layers
from lama.layers import LayerNorm, Linear, initialise
from lama.models.gpt import GPT, GPTConfig

B, T, D = 2, 5, 7


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_numpy(bias):
    layer = Linear(D, 3, bias)
    p, x = fill(layer), normal(B, T, D)
    assert p["weight"].shape == (3, D)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), linear(x, p), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_numpy(bias):
    norm = LayerNorm(D, bias, epsilon=1e-3)
    p, x = fill(norm), normal(B, T, D)
    np.testing.assert_allclose(norm(Tensor(x)).numpy(), layer_norm(x, p, 1e-3), atol=1e-5)


def test_layer_norm_has_mean_zero_and_variance_one():
    norm = LayerNorm(101, bias=False, epsilon=0.0)
    norm.weight.assign(Tensor.ones(101)).realize()
    y = norm(Tensor(3 * normal(B, T, 101) + 5)).numpy()
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1, atol=1e-4)


def test_layer_norm_ignores_scale_and_shift():
    norm, x = LayerNorm(D, epsilon=1e-12), normal(B, T, D)
    fill(norm)
    np.testing.assert_allclose(norm(Tensor(4 * x + 3)).numpy(), norm(Tensor(x)).numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_its_formula(name):
    x = np.linspace(-5, 5, 101, dtype=np.float32)
    np.testing.assert_allclose(layers.ACTIVATIONS[name](Tensor(x)).numpy(), ACTIVATIONS[name](x), atol=1e-6)


# --- how weights start

N_LAYERS = 3
CONFIG = GPTConfig(vocab_size=101, context_length=53, d_model=60, n_layers=N_LAYERS, n_heads=5, tied=False)


def weights(seed: int) -> dict[str, np.ndarray]:
    return {name: p.numpy() for name, p in get_state_dict(GPT(CONFIG, seed=seed)).items()}


@pytest.fixture(scope="module")
def start() -> dict[str, np.ndarray]:
    return weights(0)


def test_initialise_gives_no_two_matrices_the_same_values(start):
    rows = np.concatenate([value[:, :50] for value in start.values() if value.ndim == 2])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_initialise_uses_the_stds_of_gpt2(start):
    for name, value in start.items():
        if name.endswith("bias"):
            assert (value == 0).all()
        elif value.ndim == 1:
            assert (value == 1).all()
        else:
            residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            assert value.std() == pytest.approx(
                0.02 / math.sqrt(2 * N_LAYERS) if residual else 0.02, rel=0.05
            ), name
            assert abs(value.mean()) < 0.001, name


def test_initialise_depends_on_the_seed_alone(start):
    again, other = weights(0), weights(1)
    for name, value in start.items():
        np.testing.assert_array_equal(again[name], value)
        assert value.ndim == 1 or (other[name] != value).any()


def test_initialise_takes_another_std():
    layer = Linear(101, 53)
    initialise(layer, seed=0, std=0.5)
    assert layer.weight.numpy().std() == pytest.approx(0.5, rel=0.05)
