"""Families of decoders: random checkpoints of odd shapes give transformers' logits and greedy tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from lama.checkpoints import load_model, open_checkpoint
from lama.errors import LamaError
from lama.generation.decoder import Runner
from lama.models.gpt import GPT

pytestmark = pytest.mark.peers

ROPE = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 307,
    "max_position_embeddings": 160,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
}
MHA = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
SHAPES: dict[str, list[dict]] = {
    "gpt_neo": [
        {
            "vocab_size": 307,
            "max_position_embeddings": 160,
            "hidden_size": 60,
            "num_layers": 3,
            "num_heads": 6,
            "attention_types": [[["local", "global"], 1], [["local"], 1]],
            "window_size": 7,
        },
        {
            "vocab_size": 211,
            "max_position_embeddings": 140,
            "hidden_size": 52,
            "num_layers": 4,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 11,
            "intermediate_size": 75,
            "activation_function": "relu",
        },
    ],
    "opt": [
        {**MHA, "ffn_dim": 88, "word_embed_proj_dim": 60},
        {
            **MHA,
            "ffn_dim": 71,
            "word_embed_proj_dim": 36,
            "num_hidden_layers": 2,  # more layers of post-norm say a few tokens only
            "do_layer_norm_before": False,
            "num_attention_heads": 4,
        },
    ],
    "gpt_neox": [
        {
            **MHA,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.4},
        },
        {
            **MHA,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "use_parallel_residual": False,
            "attention_bias": False,
        },
    ],
    "gptj": [
        {"vocab_size": 307, "n_positions": 160, "n_embd": 60, "n_layer": 3, "n_head": 6, "rotary_dim": 6},
        {
            "vocab_size": 211,
            "n_positions": 140,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 3,
            "rotary_dim": 16,
            "n_inner": 77,
        },
    ],
    "phi": [
        {
            **SIZES,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.4},
        },
        {**MHA, "hidden_size": 64, "num_attention_heads": 4, "qk_layernorm": True, "num_key_value_heads": 4},
    ],
    "phi3": [
        {**SIZES, **ROPE, "pad_token_id": 0},
        {**SIZES, "hidden_size": 64, "num_attention_heads": 4, "sliding_window": 9, "pad_token_id": 0},
    ],
    "llama": [
        {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
        {
            **SIZES,
            "head_dim": 14,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_theta": 1000.0, "rope_type": "linear", "factor": 2.5},
        },
    ],
    "mistral": [
        {**SIZES, "sliding_window": None, "head_dim": 10},
        {**SIZES, "sliding_window": 12, "head_dim": 22, "num_key_value_heads": 1},
    ],
    "smollm3": [
        {**SIZES, "no_rope_layer_interval": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        {
            **SIZES,
            "num_hidden_layers": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "no_rope_layers": [1, 0, 0, 1],
        },
    ],
    "qwen2": [
        {**SIZES, "tie_word_embeddings": True},
        {
            **SIZES,
            "num_key_value_heads": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ],
    "qwen3": [
        {**SIZES, "head_dim": 16, "tie_word_embeddings": True},
        {
            **SIZES,
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": LAYER_TYPES,
        },
    ],
    "gemma": [
        {**SIZES, "head_dim": 16},
        {
            **SIZES,
            "head_dim": 10,
            "attention_bias": True,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
        },
    ],
    "gemma2": [
        {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 9},
        {
            **SIZES,
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "sliding_window": 150,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 7.0,
        },
    ],
    "gemma3_text": [
        {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9},
        {
            **SIZES,
            "head_dim": 10,
            "query_pre_attn_scalar": 30,
            "sliding_window": 13,
            "layer_types": LAYER_TYPES,
            "final_logit_softcapping": 7.0,
        },
    ],
    "olmo": [
        {**SIZES, "tie_word_embeddings": True},
        {**SIZES, "attention_bias": True, "num_key_value_heads": 6},
    ],
    "olmo2": [
        {**SIZES},
        {**SIZES, "attention_bias": True, "num_key_value_heads": 6, "tie_word_embeddings": True},
    ],
    "nanochat": [
        {**SIZES},
        {**SIZES, "attention_bias": True, "num_key_value_heads": 3, "final_logit_softcapping": None},
    ],
}
CASES = [(name, i) for name, shapes in SHAPES.items() for i in range(len(shapes))]
VARIED = 30  # different tokens among the greedy ones, at least
NEW = 100
LENGTHS = (5, 29, 17)  # of the prompts


def random_model(name: str, shape: dict, seed: int):
    """A random model of transformers; its weights are large, so that nothing is flat."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[name](**shape)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    gemma = name.startswith("gemma")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_()
            is_norm = "norm" in key or "ln_" in key
            if parameter.ndim == 1 and is_norm and key.endswith("weight"):
                parameter.mul_(0.3).add_(0.0 if gemma else 1.0)
            elif parameter.ndim == 1:
                parameter.mul_(0.05)  # larger biases decide for the same tokens everywhere
            elif "embed" in key or "wte" in key or "wpe" in key:
                parameter.mul_(0.02 if gemma else 0.15)  # the blocks must weigh more, or tokens repeat
            else:
                parameter.mul_(2.5 / parameter.shape[-1] ** 0.5)
    return model


def checkpoint(folder: Path, name: str, shape: dict, vary: bool = False):
    """A random model, saved in `folder`; with `vary`, the first whose greedy texts are not a few tokens."""
    for seed in range(20):
        model = random_model(name, shape, seed)
        if not vary or len(set(greedy(model, PROMPTS, NEW).ravel().tolist())) > VARIED + 5:
            break
    model.save_pretrained(folder)
    return model


def greedy(model, prompts: np.ndarray, n: int) -> np.ndarray:
    """The likeliest tokens after each prompt, by transformers: (B, n)."""
    import torch

    tokens, cache, found = torch.tensor(prompts), None, []
    for _ in range(n):
        with torch.no_grad():
            out = model(tokens, past_key_values=cache, use_cache=True)
        tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        found.append(tokens)
    return torch.cat(found, 1).numpy()


PROMPTS = np.random.default_rng(3).integers(3, 140, (3, 29))


def tokens_of(vocab: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(3, vocab, shape)


def theirs(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "i"), CASES)
def test_family_equals_transformers(name: str, i: int, tmp_path: Path):
    reference = checkpoint(tmp_path, name, SHAPES[name][i], vary=True)
    model = load_model(tmp_path)
    assert isinstance(model, GPT)
    tokens = tokens_of(model.config.vocab_size, 2, 37)
    expected = theirs(reference, tokens)
    assert expected.std() > 0.1  # not flat
    close(model(Tensor(tokens)).numpy(), expected)

    # With a cache: prompts of unequal lengths in one batch, then token by token.
    runner, rows = Runner(model, 3), [row[:n].tolist() for row, n in zip(PROMPTS, LENGTHS, strict=True)]
    logits = np.stack([runner.feed(np.array([place]), np.array([row]))[0] for place, row in enumerate(rows)])
    for _ in range(NEW):
        for place, row in enumerate(rows):
            row.append(int(logits[place].argmax()))
        logits = runner.decode(np.array([row[-1] for row in rows]))
    different = set()
    for place, (row, n) in enumerate(zip(rows, LENGTHS, strict=True)):
        expected = theirs(reference, np.array([row]))[0]
        close(logits[place], expected[-1])
        for at in range(n, len(row)):
            first, second = np.sort(expected[at - 1])[:-3:-1]
            assert row[at] == expected[at - 1].argmax() or first - second < 1e-4 * np.abs(expected).max(), at
        different |= set(row[n:])
    assert len(different) >= VARIED


@pytest.mark.parametrize(("name", "i"), CASES)
def test_config_in_the_spelling_of_transformers_4(name: str, i: int, tmp_path: Path):
    """transformers 4 wrote rope_theta and rope_scaling instead of rope_parameters, and no layer_types."""
    checkpoint(tmp_path, name, SHAPES[name][i])
    new = load_model(tmp_path).config
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    rope = fields.pop("rope_parameters", None)
    if rope is not None and "full_attention" in rope:
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope is not None:
        fields["rope_theta"] = rope.pop("rope_theta")
        if (share := rope.pop("partial_rotary_factor", None)) is not None:
            fields["rotary_pct" if name == "gpt_neox" else "partial_rotary_factor"] = share
        kind = rope.pop("rope_type")
        fields["rope_scaling"] = {**rope, "type": kind} if kind != "default" else None
    file.write_text(json.dumps(fields))
    assert load_model(tmp_path).config == new


HOSTILE = [
    None,
    -1,
    0,
    3,
    10**6,
    10**12,
    1.5,
    -0.5,
    1e308,
    "x",
    "",
    [],
    [1, -2],
    ["x"],
    {},
    {"rope_type": "x"},
    True,
    False,
]


@pytest.mark.parametrize("name", SHAPES)
def test_hostile_config_is_one_line_or_loads(name: str, tmp_path: Path):
    """Each key of a config.json in turn has each hostile value; what passes is loaded now and then."""
    checkpoint(tmp_path, name, SHAPES[name][1])
    file = tmp_path / "config.json"
    fields, n, refused = json.loads(file.read_text()), 0, 0
    for key, value in fields.items():
        if key == "model_type":
            continue
        for other in HOSTILE:
            fields[key] = other
            file.write_text(json.dumps(fields))
            n += 1
            try:
                config = open_checkpoint(tmp_path).config
                if n % 7 == 0 and config.n_layers < 100:
                    load_model(tmp_path)
            except LamaError as error:
                refused += 1
                assert str(error) and "\n" not in str(error) and len(str(error)) < 1000
        fields[key] = value
    assert refused > 50
