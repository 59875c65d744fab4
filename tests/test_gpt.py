"""The whole model: what can influence what, the cache, the sizes, the errors, the gradients."""

import re
from dataclasses import asdict

import numpy as np
import pytest
from helpers import SMALL, TOKENS, fill, layer_norm, mlp, multi_head, under
from tinygrad import Tensor
from tinygrad.nn.state import get_parameters, get_state_dict

from lama.models.config import config_from_dict
from lama.models.gpt import GPT, GPT2_CONFIGS, GPTConfig
from lama.models.protocol import CausalLM, DecoderConfig
from lama.models.registry import describe, n_parameters

T, CONTEXT = 7, 13


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(**SMALL))
    fill(model)
    return model


def test_gpt_logits_equal_numpy(model):
    p = {name: value.numpy().astype(float) for name, value in get_state_dict(model).items()}
    x = p["embed.weight"][TOKENS] + p["pos_embed.weight"][:T]
    for i in range(2):
        block = under(f"blocks.{i}", p)
        x = x + multi_head(
            layer_norm(x, under("ln1", block)), under("attn", block), 3, np.tril(np.ones((T, T), bool))
        )
        x = x + mlp(layer_norm(x, under("ln2", block)), under("mlp", block))
    expected = layer_norm(x, under("ln_final", p)) @ p["embed.weight"].T
    np.testing.assert_allclose(model(Tensor(TOKENS)).numpy(), expected, atol=1e-5 * np.abs(expected).max())


# --- causality


@pytest.mark.parametrize("place", [0, 3, T - 1])
def test_gpt_tokens_change_their_own_and_later_logits_only(model, place):
    changed = TOKENS.copy()
    changed[:, place] = 10
    difference = np.abs(model(Tensor(changed)).numpy() - model(Tensor(TOKENS)).numpy()).max((0, 2))
    assert difference[:place].max(initial=0) == 0
    assert difference[place:].min() > 1e-4


def test_gpt_rows_of_a_batch_do_not_meet(model):
    changed = np.stack([TOKENS[0], TOKENS[0]])
    np.testing.assert_array_equal(model(Tensor(changed)).numpy()[0], model(Tensor(TOKENS)).numpy()[0])


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_gpt_runs_on_the_device_of_its_weights(positions):
    model = GPT(GPTConfig(**SMALL | {"positions": positions, "n_layers": 1}))
    for parameter in get_parameters(model):
        parameter.to_("NULL")
    assert model(Tensor(TOKENS, device="NULL")).realize().device == "NULL"


# --- the cache


@pytest.mark.parametrize(
    ("positions", "n_layers", "pieces"), [("learned", 2, [5, 1, 1]), ("sinusoidal", 1, [3, 4])]
)
def test_gpt_cached_decode_equals_the_full_forward(positions, n_layers, pieces):
    model = GPT(GPTConfig(**SMALL | {"positions": positions, "n_layers": n_layers}))
    fill(model)
    cache, logits, position = model.new_cache(batch=2), [], 0
    for n in pieces:
        logits.append(model(Tensor(TOKENS[:, position : position + n].copy()), cache).numpy())
        cache.advance(n)
        position += n
    np.testing.assert_allclose(np.concatenate(logits, 1), model(Tensor(TOKENS)).numpy(), atol=1e-5)


def test_gpt_new_cache_holds_the_context_unless_told(model):
    assert model.new_cache().keys[0].shape == (1, 3, CONTEXT, 2)
    assert model.new_cache(batch=2, length=5).values[1].shape == (2, 3, 5, 2)


# --- sizes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_presets_have_the_published_parameter_counts(name, count):
    config = GPT2_CONFIGS[name]
    d = config.d_model
    assert n_parameters(GPT(config, seed=None)) == count
    assert count == 50257 * d + 1024 * d + config.n_layers * (12 * d**2 + 13 * d) + 2 * d


def test_gpt_without_layers_looks_at_one_token_alone():
    model = GPT(GPTConfig(**SMALL | {"n_layers": 0, "positions": "none"}))
    fill(model)
    logits = model(Tensor(np.array([[3, 5, 3]], np.int32))).numpy()[0]
    np.testing.assert_array_equal(logits[0], logits[2])
    assert (logits[0] != logits[1]).any()


def test_gpt_describe_says_the_shape(model):
    count = n_parameters(model)
    assert (
        describe(model)
        == f"GPT, {count:,} parameters: 2 layers x 3 heads, d_model 6, d_mlp 17, context 13, vocabulary 11"
    )


def test_gpt_config_mlp_is_four_times_as_wide_by_default():
    assert GPTConfig(d_model=10, n_heads=5).d_mlp == 40


def test_gpt_without_mlps_is_attention_alone():
    model = GPT(GPTConfig(**SMALL | {"mlp": False, "d_mlp": 0, "bias": False, "norm": "none"}))
    d, V, T = 6, 11, 13
    assert model.config.d_mlp == 0 and n_parameters(model) == V * d + T * d + 2 * 4 * d * d
    assert config_from_dict(GPTConfig, asdict(model.config)) == model.config
    assert model(Tensor(TOKENS)).shape == (2, 7, V)


# --- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 4}, "d_model must be a multiple of n_heads; got d_model=6, n_heads=4"),
        ({"n_layers": -1}, "n_layers must be at least 0; got n_layers=-1"),
        ({"vocab_size": -1}, "vocab_size must be at least 1; got vocab_size=-1"),
        (
            {"activation": "mish"},
            "activation must be one of gelu_new, gelu, relu, silu, tanh, quick_gelu, relu2; got 'mish'",
        ),
        ({"norm": "both"}, "norm must be one of pre, post, none, output, sandwich; got 'both'"),
        ({"positions": "rotary"}, "positions must be one of learned, sinusoidal, none, rope; got 'rotary'"),
        ({"mlp": False}, "d_mlp must be 0 with mlp=False; got d_mlp=17"),
        ({"n_heads": True}, "n_heads must be of type int; got n_heads=True"),
        ({"n_layers": 10**9}, "n_layers must be at most 10,000; got n_layers=1000000000"),
        ({"norm_epsilon": -1.0}, "norm_epsilon must be at least 0 and below 1; got norm_epsilon=-1.0"),
        (
            {"similarity": "cosine"},
            "similarity must be one of dot, scaled_dot, general, additive; got 'cosine'",
        ),
    ],
)
def test_gpt_refuses_in_one_line(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GPT(GPTConfig(**SMALL | fields))


def test_gpt_refuses_tokens_past_the_context(model):
    with pytest.raises(
        ValueError, match=r"^tokens must fit context_length; got 14 tokens, context_length=13$"
    ):
        model(Tensor.zeros(1, 14, dtype="int"))
    with pytest.raises(ValueError, match="cannot hold 14 tokens"):
        cache = model.new_cache()
        cache.advance(12)
        model(Tensor.zeros(1, 2, dtype="int"), cache)


def test_gpt_config_from_dict_names_unknown_fields():
    assert config_from_dict(GPTConfig, {"d_model": 10, "n_heads": 5}) == GPTConfig(d_model=10, n_heads=5)
    with pytest.raises(ValueError, match=r"config fields must be among activation, .*; got depth, width$"):
        config_from_dict(GPTConfig, {"width": 1, "depth": 2, "d_model": 10})


# --- gradients


def loss_of(model: GPT) -> Tensor:
    return model(Tensor(TOKENS)).sparse_categorical_crossentropy(Tensor(np.roll(TOKENS, -1, axis=1)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied": False, "norm": "post", "similarity": "general"},
        {"norm": "none", "positions": "none"},
        {"residual": False},
    ],
)
def test_every_parameter_gets_the_slope_of_the_loss(fields):
    model = GPT(GPTConfig(**SMALL | {"n_layers": 1} | fields))
    start, parameters = fill(model), get_state_dict(model)
    gradients = loss_of(model).gradient(*parameters.values())
    Tensor.realize(*gradients)
    for name, gradient in zip(parameters, gradients, strict=True):
        assert np.isfinite(gradient.numpy()).all(), name
        assert np.abs(gradient.numpy()).max() > 1e-6, name

    slopes, direction = dict(zip(parameters, gradients, strict=True)), 3e-3
    losses = []
    for sign in (1, -1):  # all parameters moved at once, each along its own gradient
        for name, parameter in parameters.items():
            g = slopes[name].numpy()
            parameter.assign(Tensor(start[name] + sign * direction * g / np.linalg.norm(g))).realize()
        losses.append(loss_of(model).item())
    expected = sum(np.linalg.norm(g.numpy()) for g in gradients)
    assert (losses[0] - losses[1]) / (2 * direction) == pytest.approx(expected, rel=0.02)


def test_gpt_is_a_causal_language_model_with_causal_self_attention(model):
    assert isinstance(model, CausalLM) and isinstance(model.config, DecoderConfig)
    (site,) = model.attention_sites().values()
    assert site.causal and site.modules == [block.attn for block in model.blocks]
    assert site.names == [f"blocks.{i}.attn" for i in range(len(model.blocks))]
