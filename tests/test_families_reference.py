"""Llama's and GPT-NeoX's blocks against plain numpy, their gradients against finite differences of it."""

import numpy as np
import pytest
from helpers import fill
from reference import numpy_families
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.errors import LamaError
from lama.generation import generate_tokens
from lama.models.gpt import GPT, GPTConfig

SHAPE = {"vocab_size": 31, "context_length": 24, "d_model": 20, "n_layers": 2, "n_heads": 4, "d_mlp": 28}
ROPE = {"positions": "rope", "rope_theta": 100.0}
MODELS = {
    "llama": {
        **ROPE,
        "n_kv_heads": 2,
        "d_head": 6,
        "norm_kind": "rms",
        "gated": True,
        "activation": "silu",
        "bias": False,
    },
    "gpt_neox": {
        **ROPE,
        "d_head": 6,
        "d_rotated": 2,
        "layout": "parallel",
        "activation": "gelu",
        "tied": False,
    },
}
TOKENS = np.random.default_rng(0).integers(0, 31, 17)


def made(name: str) -> tuple[GPT, dict, dict]:
    """A model, its weights in float64, and the sizes that the reference needs."""
    model = GPT(GPTConfig(**SHAPE | MODELS[name]))
    fill(model, seed=1)
    weights = {key: value.numpy().astype(float) for key, value in get_state_dict(model).items()}
    c = model.config
    sizes = {"n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "d_head": c.d_head}
    return model, weights, {**sizes, "theta": c.rope_theta, "rotated": c.d_rotated}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_plain_numpy(name: str):
    model, weights, sizes = made(name)
    expected = getattr(numpy_families, name)(TOKENS, weights, sizes)
    found = model(Tensor(TOKENS.reshape(1, -1))).numpy()[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_finite_differences(name: str):
    """For each parameter, the slope of the loss along a random direction."""
    model, weights, sizes = made(name)
    targets = np.roll(TOKENS, 1)
    reference = getattr(numpy_families, name)

    def loss(weights: dict) -> float:
        logits = reference(TOKENS, weights, sizes)
        logits = logits - logits.max(-1, keepdims=True)
        return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(TOKENS)), targets]).mean())

    from lama.ops import cross_entropy

    logits = model(Tensor(TOKENS.reshape(1, -1)))
    parameters = get_state_dict(model)
    gradients = cross_entropy(logits, Tensor(targets.reshape(1, -1))).mean().gradient(*parameters.values())
    Tensor.realize(*gradients)
    rng, step = np.random.default_rng(2), 1e-5
    for key, gradient in zip(parameters, gradients, strict=True):
        direction = rng.standard_normal(weights[key].shape)
        ends = [loss(weights | {key: weights[key] + sign * step * direction}) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((gradient.numpy() * direction).sum()) == pytest.approx(expected, rel=2e-4, abs=2e-6), key


@pytest.mark.parametrize("name", MODELS)
def test_cache_continues_as_the_whole_does(name: str):
    model, _, _ = made(name)
    prompts = [TOKENS[:3].tolist(), TOKENS[:9].tolist()]
    rows = [list(prompt) for prompt in prompts]
    for step in generate_tokens(model, prompts, 8):
        for row, token in zip(rows, step, strict=True):
            row.append(token)
    for prompt, row in zip(prompts, rows, strict=True):
        logits = model(Tensor([row])).numpy()[0]
        assert row[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads; got n_heads=4, n_kv_heads=3"),
        (
            {"positions": "rope", "d_rotated": 3},
            "d_rotated must be even, and at most d_head; got d_rotated=3",
        ),
        (
            {"positions": "rope", "d_rotated": 8},
            "d_rotated must be even, and at most d_head; got d_rotated=8",
        ),
        ({"rope_scaling": (1.0, 2.0)}, "rope_scaling must be (factor,) or (factor, low, high, length)"),
        ({"rope_scaling": (8.0, 4.0, 1.0, 64.0)}, "rope_scaling must have low < high"),
        ({"windows": (-1,)}, "windows must be whole numbers of at least 0; got (-1,)"),
        ({"layout": "parallel", "norm": "post"}, "layout=parallel requires norm pre or none; got 'post'"),
        ({"head_bias": True}, "head_bias must be False with tied=True"),
        ({"logit_cap": -1.0}, "logit_cap must be at least 0; got logit_cap=-1.0"),
        ({"embed_scale": 0.0}, "embed_scale must be above 0; got embed_scale=0.0"),
        (
            {"similarity": "additive", "attention_cap": 5.0},
            "attention_cap requires similarity dot or scaled_dot",
        ),
        ({"norm_kind": "batch"}, "norm_kind must be one of layer, rms; got 'batch'"),
        ({"qk_norm": "some"}, "qk_norm must be one of none, head, all, head_after; got 'some'"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused_in_one_line(fields, message: str):
    with pytest.raises((ValueError, LamaError)) as error:
        GPTConfig(**SHAPE | fields)
    assert message in str(error.value) and "\n" not in str(error.value)
