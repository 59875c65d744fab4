"""Looking at activations leaves them alone; replacing them does what it says."""

import numpy as np
import pytest
from helpers import SMALL, TOKENS
from tinygrad import Tensor

from lama import attention
from lama.models.gpt import GPT, GPTConfig
from lama.taps import Recorder, chain, no_tap, replace, scoped

B, T, H, D_HEAD = 2, 7, 3, 2


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(GPTConfig(**SMALL))


def test_recording_does_not_change_the_logits(model, monkeypatch):
    tokens = Tensor(TOKENS)
    looked_at = model(tokens, tap=Recorder()).numpy()
    # Kernels without scores round differently.
    np.testing.assert_allclose(looked_at, model(tokens).numpy(), rtol=0, atol=1e-7)
    monkeypatch.setattr(attention, "scale_of", lambda *args: None)
    np.testing.assert_array_equal(looked_at, model(tokens).numpy())


def test_taps_have_the_documented_names_and_shapes(model):
    record = Recorder()
    model(Tensor(TOKENS), tap=record)
    stream, heads, square, wide = (B, T, 6), (B, H, T, D_HEAD), (B, H, T, T), (B, T, 17)
    block = {
        "resid_pre": stream,
        "ln1.normalized": stream,
        "attn.q": heads,
        "attn.k": heads,
        "attn.v": heads,
        "attn.scores": square,
        "attn.pattern": square,
        "attn.z": heads,
        "attn_out": stream,
        "resid_mid": stream,
        "ln2.normalized": stream,
        "mlp.pre": wide,
        "mlp.post": wide,
        "mlp_out": stream,
        "resid_post": stream,
    }
    expected = {"embed": stream, "pos_embed": (T, 6), "ln_final.normalized": stream, "logits": (B, T, 11)}
    expected |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert {name: value.shape for name, value in record.items()} == expected


def test_recorder_keeps_what_matches(model):
    record = Recorder("*.pattern", "embed")
    model(Tensor(TOKENS), tap=record)
    assert sorted(record) == ["blocks.0.attn.pattern", "blocks.1.attn.pattern", "embed"]
    pattern = record["blocks.1.attn.pattern"].numpy()
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
    assert (pattern[..., ~np.tril(np.ones((T, T), bool))] == 0).all()


def test_replaced_activation_is_what_the_model_goes_on_with(model):
    record = Recorder("blocks.1.resid_pre", "logits")
    silent = replace({"blocks.0.attn_out": lambda x: x * 0, "blocks.0.mlp_out": lambda x: x * 0})
    model(Tensor(TOKENS), tap=chain(silent, record, replace({"logits": lambda x: x * 0})))
    embedded = model.embed(Tensor(TOKENS)) + model.pos_embed(T)
    np.testing.assert_allclose(record["blocks.1.resid_pre"].numpy(), embedded.numpy(), atol=1e-6)
    assert np.abs(record["logits"].numpy()).max() > 0


def test_replace_removes_one_head(model):
    keep = Tensor([0.0, 1, 1]).reshape(1, H, 1, 1)
    record = Recorder("*.z", "*.attn_out")
    model(Tensor(TOKENS), tap=chain(replace({"blocks.0.attn.z": lambda z: z * keep}), record))
    z, out = record["blocks.0.attn.z"].numpy(), record["blocks.0.attn_out"].numpy()
    assert (z[:, 0] == 0).all() and (z[:, 1:] != 0).all()
    weight, bias = model.blocks[0].attn.out.weight.numpy(), model.blocks[0].attn.out.bias.numpy()
    np.testing.assert_allclose(
        out, z[:, 1:].transpose(0, 2, 1, 3).reshape(B, T, 4) @ weight[:, 2:].T + bias, atol=1e-6
    )


def test_replace_refuses_another_shape(model):
    tap = replace({"blocks.1.mlp.post": lambda x: x[:, :2]})
    with pytest.raises(
        ValueError, match=r"keep its shape; got \(2, 2, 17\) for blocks.1.mlp.post \(2, 7, 17\)"
    ):
        model(Tensor(TOKENS), tap=tap)


def test_chain_applies_taps_in_order():
    tap = chain(replace({"x": lambda x: x + 1}), replace({"x": lambda x: x * 10}))
    assert tap("x", Tensor([1.0])).tolist() == [20.0]
    assert tap("y", Tensor([1.0])).tolist() == [1.0]


def test_scoped_names_the_layer_and_costs_nothing_without_a_tap():
    record = Recorder()
    scoped(scoped(record, "blocks.3"), "attn")("q", Tensor([1.0]))
    assert list(record) == ["blocks.3.attn.q"]
    assert scoped(no_tap, "attn") is no_tap
