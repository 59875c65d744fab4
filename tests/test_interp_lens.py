"""The lens reads what a shorter model would say; attributed parts add up to the logit difference."""

import numpy as np
import pytest
from helpers import SMALL, TOKENS, fill, softmax
from tinygrad import Tensor

import lama
from lama.errors import LamaError
from lama.interp.lens import attribute, logit_lens
from lama.interp.record import run_with_cache
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import CharacterTokenizer

CONFIGS = [
    {},
    {"norm": "none", "positions": "none"},
    {"tied": False, "bias": False, "positions": "sinusoidal"},
    {"norm_kind": "rms", "bias": False, "gated": True, "positions": "rope", "n_kv_heads": 1, "d_head": 6},
    {"norm": "sandwich", "norm_kind": "rms", "qk_norm": "head", "embed_scale": 3.0, "logit_cap": 5.0},
    {"norm": "output", "qk_norm": "all", "attention_cap": 2.0, "windows": (3, 0)},
    {"layout": "parallel", "norm_weight": False, "positions": "rope", "d_rotated": 2},
    {"layout": "parallel_one_norm", "tied": False, "head_bias": True, "qkv_bias": False},
]
ROW = TOKENS[0].tolist()


def make(**changes) -> GPT:
    model = GPT(GPTConfig(**SMALL | changes))
    fill(model, seed=7)
    return model


@pytest.mark.parametrize("changes", [*CONFIGS, {"norm": "post"}, {"residual": False}], ids=str)
def test_lens_reads_what_the_model_without_the_later_layers_would_say(changes):
    model = make(**changes)
    lens = logit_lens(model, ROW, answer=4, k=3)
    assert lens.top.shape == lens.top_probability.shape == (
        3,
        7,
        3,
    ) and lens.rank.shape == lens.probability.shape == (3, 7)
    blocks = model.blocks
    for n in range(3):
        model.blocks = blocks[:n]
        expected = softmax(model(Tensor([ROW])).numpy()[0].astype(float))
        np.testing.assert_allclose(lens.probability[n], expected[:, 4], atol=1e-5)
        order = np.argsort(-expected, axis=-1)
        np.testing.assert_array_equal(lens.top[n], order[:, :3])
        np.testing.assert_allclose(
            lens.top_probability[n], np.take_along_axis(expected, order[:, :3], -1), atol=1e-5
        )
        np.testing.assert_array_equal(lens.rank[n], [1 + row.tolist().index(4) for row in order])


def test_lens_without_an_answer_follows_what_the_model_says():
    model = make()
    lens = logit_lens(model, ROW)
    assert lens.answer == model(Tensor([ROW])).numpy()[0, -1].argmax() == lens.top[-1, -1, 0]
    assert lens.rank[-1, -1] == 1


def test_lens_shows_no_more_tokens_than_there_are():
    assert logit_lens(make(n_layers=0), ROW, answer=4, k=100).top.shape == (1, 7, 11)


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("against", [8, None])
def test_attributed_parts_add_up_to_the_logit_difference(changes, against):
    model = make(**changes)
    found = attribute(model, ROW, answer=4, against=against)
    logits = model(Tensor([ROW])).numpy()[0, -1].astype(float)
    if cap := model.config.logit_cap:
        logits = cap * np.arctanh(logits / cap)
    assert found.difference == pytest.approx(
        logits[4] - (logits.mean() if against is None else logits[against]), abs=1e-5
    )
    assert sum(found.parts.values()) == pytest.approx(found.difference, abs=1e-4)
    names = [
        "embed",
        "pos_embed",
        *(f"blocks.{i}.{part}_out" for i in range(2) for part in ("attn", "mlp")),
        "ln_final.bias",
    ]
    assert list(found.parts) == names
    rest = [found.parts[f"blocks.{i}.attn_out"] - found.heads[i].sum() for i in range(2)]
    assert (np.abs(rest) > 1e-4).all() == model.config.bias


def test_attribution_without_mlps_has_none():
    found = attribute(make(mlp=False, d_mlp=0), ROW, answer=4, against=8)
    assert list(found.parts) == [
        "embed",
        "pos_embed",
        "blocks.0.attn_out",
        "blocks.1.attn_out",
        "ln_final.bias",
    ]
    assert sum(found.parts.values()) == pytest.approx(found.difference, abs=1e-4)


def test_a_part_is_what_is_missing_without_it_while_the_norm_divides_as_before():
    model = make()
    found = attribute(model, ROW, answer=4, against=8)
    _, cache = run_with_cache(model, ROW)
    stream = cache["blocks.1.resid_post"][0, -1].astype(float)
    weight, bias, W_E = (
        p.numpy().astype(float) for p in (model.ln_final.weight, model.ln_final.bias, model.embed.weight)
    )
    scale = np.sqrt(stream.var() + 1e-5)

    def difference(x: np.ndarray) -> float:
        logits = W_E @ ((x - x.mean()) / scale * weight + bias)
        return logits[4] - logits[8]

    for name in ("embed", "blocks.0.attn_out", "blocks.1.mlp_out"):
        assert found.parts[name] == pytest.approx(
            difference(stream) - difference(stream - cache[name][0, -1]), abs=1e-4
        )
    head = cache["blocks.1.attn.z"][0, 2, -1] @ model.blocks[1].attn.out.weight.numpy()[:, 4:].T
    assert found.heads[1, 2] == pytest.approx(difference(stream) - difference(stream - head), abs=1e-4)


def test_parts_of_a_quantised_model_add_up(tmp_path):
    lama.save(tmp_path, make(bias=False), CharacterTokenizer("abcdefghijk"))
    model, _ = lama.load(tmp_path, dtype="int8")
    found = attribute(model, ROW, answer=4, against=8)
    assert sum(found.parts.values()) == pytest.approx(found.difference, abs=1e-4)
    attention = [found.parts[f"blocks.{i}.attn_out"] for i in range(2)]
    np.testing.assert_allclose(found.heads.sum(1), attention, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "got"), [({"norm": "post"}, "norm=post"), ({"residual": False}, "residual=False")]
)
def test_attribution_is_refused_where_parts_do_not_add_up(changes, got):
    with pytest.raises(LamaError, match=f"must add up in the stream, .*; got a model with {got}"):
        attribute(make(**changes), ROW, answer=4)
