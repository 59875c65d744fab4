"""The MLP and the block against numpy."""

import helpers
import numpy as np
import pytest
from helpers import ACTIVATIONS, fill, layer_norm, mlp, multi_head, normal, under
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.blocks import MLP
from lama.layers import LayerNorm
from lama.masks import causal_mask
from lama.taps import Recorder

B, T, S, H, D_MODEL, D_MLP = 2, 5, 7, 3, 12, 17
CAUSAL = np.tril(np.ones((T, T), bool))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_numpy(activation):
    layer = MLP(D_MODEL, D_MLP, activation=activation)
    p, x = fill(layer), normal(B, T, D_MODEL)
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), mlp(x, p, activation), atol=1e-4)


def test_pre_norm_block_equals_numpy():
    block = helpers.block(D_MODEL, H, D_MLP, norm="pre")
    p, x = fill(block), normal(B, T, D_MODEL)
    mid = x + multi_head(layer_norm(x, under("ln1", p)), under("attn", p), H, CAUSAL)
    expected = mid + mlp(layer_norm(mid, under("ln2", p)), under("mlp", p))
    np.testing.assert_allclose(block(Tensor(x), causal_mask(T, T)).numpy(), expected, atol=1e-3)


def test_post_norm_block_equals_numpy():
    block = helpers.block(D_MODEL, H, D_MLP, norm="post")
    p, x = fill(block), normal(B, T, D_MODEL)
    mid = layer_norm(x + multi_head(x, under("attn", p), H, CAUSAL), under("ln1", p))
    expected = layer_norm(mid + mlp(mid, under("mlp", p)), under("ln2", p))
    np.testing.assert_allclose(block(Tensor(x), causal_mask(T, T)).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_cross_attention_block_equals_numpy(norm):
    block = helpers.block(D_MODEL, H, D_MLP, norm=norm, cross=True)
    p, x, memory = fill(block), normal(B, T, D_MODEL), normal(B, S, D_MODEL, seed=1)
    memory_mask = np.arange(S) < S - 2

    def sublayer(x: np.ndarray, ln: str, f) -> np.ndarray:
        return x + f(layer_norm(x, under(ln, p))) if norm == "pre" else layer_norm(x + f(x), under(ln, p))

    y = sublayer(x, "ln1", lambda h: multi_head(h, under("attn", p), H, CAUSAL))
    y = sublayer(y, "ln_cross", lambda h: multi_head(h, under("cross_attn", p), H, memory_mask, memory))
    y = sublayer(y, "ln2", lambda h: mlp(h, under("mlp", p)))
    actual = block(Tensor(x), causal_mask(T, T), Tensor(memory), Tensor(memory_mask))
    np.testing.assert_allclose(actual.numpy(), y, atol=1e-3)


def test_block_adds_attention_and_mlp_to_the_stream(monkeypatch):
    block = helpers.block(D_MODEL, H, D_MLP)
    monkeypatch.setattr(LayerNorm, "__call__", lambda norm, x: x)
    block.attn = lambda x, *rest: Tensor.full(x.shape, 0.1)
    block.mlp = lambda x, *rest: Tensor.full(x.shape, 0.2)
    np.testing.assert_allclose(block(Tensor.ones(B, T, D_MODEL)).numpy(), 1.3, rtol=1e-6)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_block_without_an_mlp_is_attention_alone(norm):
    block = helpers.block(D_MODEL, H, d_mlp=0, norm=norm)
    p, x = fill(block), normal(B, T, D_MODEL)
    assert not [name for name in p if name.startswith(("mlp", "ln2"))]
    h = multi_head(layer_norm(x, under("ln1", p)) if norm == "pre" else x, under("attn", p), H, CAUSAL)
    expected = layer_norm(x + h, under("ln1", p)) if norm == "post" else x + h
    record = Recorder()
    np.testing.assert_allclose(block(Tensor(x), causal_mask(T, T), tap=record).numpy(), expected, atol=1e-3)
    assert list(record)[-2:] == ["resid_mid", "resid_post"] and "mlp_out" not in record


def test_block_without_stream_or_norms_is_what_is_left(monkeypatch):
    def tenth(x: Tensor, *rest: object) -> Tensor:
        return x * 0.1

    for kind, expected in (({"residual": False, "norm": "none"}, 0.01), ({"norm": "none"}, 1.21)):
        block = helpers.block(D_MODEL, H, D_MLP, **kind)
        assert not [name for name in get_state_dict(block) if name.startswith("ln")]
        block.attn = block.mlp = tenth
        np.testing.assert_allclose(block(Tensor.ones(B, T, D_MODEL)).numpy(), expected, rtol=1e-6)


def test_block_without_bias_has_none():
    names = fill(helpers.block(D_MODEL, H, D_MLP, bias=False, cross=True))
    assert not [name for name in names if name.endswith("bias")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "middle"}, "^order must be one of pre, post, none, output, sandwich; got 'middle'$"),
        (
            {"activation": "mish"},
            "^activation must be one of gelu_new, gelu, relu, silu, tanh, quick_gelu, relu2; got 'mish'$",
        ),
        ({"similarity": "cosine"}, "^similarity must be one of .*; got 'cosine'$"),
        ({"n_heads": 5}, "^d_model must be a multiple of n_heads; got d_model=12, n_heads=5$"),
    ],
)
def test_block_refuses_by_name_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        helpers.block(**{"d_model": D_MODEL, "n_heads": H, "d_mlp": D_MLP} | arguments)


@pytest.mark.parametrize("cross", [False, True])
def test_block_wants_memory_exactly_with_cross_attention(cross):
    x = Tensor.ones(B, T, D_MODEL)
    with pytest.raises(ValueError, match=rf"got cross={cross}"):
        helpers.block(D_MODEL, H, D_MLP, cross=cross)(x, memory=None if cross else x)
