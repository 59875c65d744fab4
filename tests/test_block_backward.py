"""The gradients of a block against those worked out by hand in numpy: see tests/reference/numpy_block.py."""

import helpers
import numpy as np
from helpers import fill, normal
from reference.numpy_block import block
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.masks import causal_mask

B, T, D, HEADS = 2, 7, 6, 3


def double(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in values.items()}


def test_block_and_all_its_gradients_equal_numpy():
    own = helpers.block(D, HEADS, d_mlp=17)
    weights, x, dy = fill(own), normal(B, T, D), normal(B, T, D, seed=1)
    stream = Tensor(x).realize()
    y = own(stream, causal_mask(T, T))
    parameters = get_state_dict(own)
    dx, *gradients = y.gradient(stream, *parameters.values(), gradient=Tensor(dy))
    expected_y, expected_dx, expected = block(
        x.astype(np.float64), double(weights), HEADS, dy.astype(np.float64)
    )
    np.testing.assert_allclose(y.numpy(), expected_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.numpy(), expected_dx, rtol=1e-5, atol=1e-5)
    assert expected.keys() == parameters.keys()
    for name, gradient in zip(parameters, gradients, strict=True):
        np.testing.assert_allclose(gradient.numpy(), expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_gradients_by_hand_are_the_slopes_of_the_loss():
    rng = np.random.default_rng(0)
    w = double(fill(helpers.block(D, HEADS, d_mlp=17)))
    x, dy = rng.standard_normal((2, B, T, D))
    _, dx, gradients = block(x, w, HEADS, dy)
    step = 1e-6
    for name, gradient in (("x", dx), *gradients.items()):
        direction = rng.standard_normal(gradient.shape)

        def loss(sign: int, name: str = name, direction: np.ndarray = direction) -> float:
            moved = {name: (x if name == "x" else w[name]) + sign * step * direction}
            return float((block(moved.get("x", x), {**w, **moved}, HEADS, dy)[0] * dy).sum())

        np.testing.assert_allclose(
            (loss(1) - loss(-1)) / (2 * step), (gradient * direction).sum(), rtol=1e-6, err_msg=name
        )
