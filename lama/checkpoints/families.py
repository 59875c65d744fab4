"""Hugging Face's current decoders: for each `model_type`, a table of names and a table of config fields.

Source: transformers 5.24, models/*/configuration_*.py and modeling_*.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from lama.checkpoints.gpt2 import FIELDS as GPT2_FIELDS
from lama.checkpoints.huggingface import (
    COMMON_FIELDS,
    checked_config,
    end_tokens,
    read_fields,
    rename,
    renamed,
    tie,
)
from lama.checkpoints.rows import joined, mapped, selected
from lama.checkpoints.tensor import FileTensor, read_weights
from lama.errors import LamaError, quoted
from lama.files import checked
from lama.models.config import config_from_dict
from lama.models.gpt import GPTConfig
from lama.shapes import Array

T = TypeVar("T")
Fields = Mapping[str, object]
Tensors = dict[str, FileTensor]
BUFFERS = (".attention.bias", ".masked_bias", ".rotary_emb.inv_freq", ".attn.attention.bias", ".attn.bias")
HEADS = ("score.", "classifier.", "qa_outputs.", "v_head.")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """The rules by which lama reads the models of one `model_type`."""

    names: Mapping[str, str]
    """The family's layer names -> lama's; `*` is the number of the block."""
    fields: Mapping[str, str]
    """Keys of config.json -> fields of GPTConfig."""
    defaults: Fields
    """The values of missing keys."""
    fixed: Fields
    """Fields of GPTConfig that are the same for all models of the family."""
    more: "Callable[[Fields, Source], Fields]" = lambda fields, source: {}
    """Gives further fields of GPTConfig, from the keys of config.json and their defaults."""
    weights: Callable[[Tensors, GPTConfig, Fields], None] = lambda tensors, config, fields: None
    """Converts the tensors, under lama's names, to lama's layout, in place."""
    prefix: str = "model."
    """The prefix of a model with a language-modelling head."""
    required: Fields = field(default_factory=dict)
    """Keys that would change the results, and the value that lama supports."""


@dataclass(frozen=True)
class Source:
    """Reads keys of a config.json, with errors that name it."""

    name: object

    def get(self, fields: Fields, key: str, kind: type[T]) -> T | None:
        """The value of a key; None if it is null or missing. Raises LamaError for another type."""
        value = fields.get(key)
        return None if value is None else checked(value, kind, f"{key} in {self.name}")

    def refuse(self, key: str, value: object) -> LamaError:
        """The error for a value that lama does not support."""
        return LamaError(f"{self.name} has {key}={quoted(value)}, which lama does not support")


# --- shared by families


def rope_of(fields: Fields, source: Source) -> dict[str, object]:
    """Rotary positions, in the spelling of transformers 5 (rope_parameters) or of 4. Raises LamaError."""
    found = source.get(fields, "rope_parameters", dict) or source.get(fields, "rope_scaling", dict) or {}
    return _rope(found, fields, source)


def _rope(found: Fields, fields: Fields, source: Source) -> dict[str, object]:
    theta = source.get(found, "rope_theta", float) or source.get(fields, "rope_theta", float) or 10000.0
    kind = found.get("rope_type", found.get("type", "default"))
    own: dict[str, object] = {"positions": "rope", "rope_theta": float(theta)}
    if kind == "linear":
        own["rope_scaling"] = (_positive(found, "factor", source),)
    elif kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        own["rope_scaling"] = tuple(_positive(found, key, source) for key in keys)
    elif kind != "default":
        raise source.refuse("rope_type", kind)
    return own


def _positive(fields: Fields, key: str, source: Source) -> float:
    value = source.get(fields, key, float)
    if value is None or value <= 0:
        raise LamaError(f"{key} in {source.name} must be a positive number; got {quoted(value)}")
    return float(value)


def rotated(fields: Fields, source: Source, key: str) -> dict[str, object]:
    """The numbers of a head that rope rotates, from their share in rope_parameters or in the key `key`."""
    found = source.get(fields, "rope_parameters", dict) or {}
    share = source.get(found, "partial_rotary_factor", float)
    if share is None:
        share = source.get(fields, key, float)
    heads, width = (source.get(fields, name, int) for name in ("num_attention_heads", "hidden_size"))
    if share is None or not heads or not width:
        return {}
    return {"d_rotated": int(width // heads * share)}


def attention_bias(fields: Fields, source: Source) -> dict[str, object]:
    """The biases of all four projections, which are one key."""
    bias = bool(source.get(fields, "attention_bias", bool))
    return {"qkv_bias": bias, "out_bias": bias}


def windows_of(fields: Fields, source: Source, layer_types: Sequence[object] | None) -> dict[str, object]:
    """The window of each layer, by the `layer_types` in the file or else the given ones of its family."""
    types = source.get(fields, "layer_types", list) or layer_types or []
    window = source.get(fields, "sliding_window", int)
    if unknown := [each for each in types if each not in (FULL, SLIDING)]:
        raise source.refuse("layer_types", unknown[0])
    if window is None or SLIDING not in types:
        return {}
    return {"windows": tuple(window if each == SLIDING else 0 for each in types)}


def layers(fields: Fields, source: Source) -> range:
    """The numbers of the layers. Raises LamaError for more than 10,000."""
    n = source.get(fields, "num_hidden_layers", int) or 0
    if not 0 <= n <= 10_000:
        raise LamaError(f"num_hidden_layers in {source.name} must be from 0 to 10,000; got {n}")
    return range(n)


def join_qkv(tensors: Tensors) -> None:
    """Join the tensors of queries, keys and values into one."""
    for name in [name for name in tensors if ".attn.q." in name]:
        names = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        parts = [tensors[each] for each in names if each in tensors]
        forms = {(part.shape[1:], part.dtype) for part in parts}
        if len(parts) == 3 and len(forms) == 1 and all(part.shape for part in parts):
            for each in names:
                del tensors[each]
            tensors[name.replace(".q.", ".qkv.")] = joined(parts)


def split_qkv(tensors: Tensors, config: GPTConfig) -> None:
    """Split what `join_qkv` joins."""
    ends = np.cumsum([0, config.n_heads, config.n_kv_heads, config.n_kv_heads]) * config.d_head
    for name in [name for name in tensors if ".attn.qkv." in name]:
        both = tensors.pop(name)
        for part, start, end in zip("qkv", ends[:-1], ends[1:], strict=True):
            tensors[name.replace(".qkv.", f".{part}.")] = selected(both, np.arange(start, end))


def permute_heads(
    tensors: Tensors, config: GPTConfig, order: Callable[[int], Array], parts: str = "qk"
) -> None:
    """Reorder the rows of each head in the projections `parts`; `order(d_head)` is the new order."""
    rows = order(config.d_head)
    for name, tensor in tensors.items():
        if any(f".attn.{part}." in name for part in parts) and tensor.shape:
            starts = np.arange(0, tensor.shape[0], config.d_head)[:, None]
            tensors[name] = selected(tensor, (starts + rows).reshape(-1)[: tensor.shape[0]])


def split_gates(tensors: Tensors, layer: str) -> None:
    """Split the matrix of an MLP's `layer`, which has the rows of `gate`, then those of `up`."""
    for name in [name for name in tensors if f".mlp.{layer}." in name]:
        both = tensors.pop(name)
        half = both.shape[0] // 2 if both.shape else 0
        for part, rows in (("gate", np.arange(half)), ("up", np.arange(half, 2 * half))):
            tensors[name.replace(f".{layer}.", f".{part}.")] = selected(both, rows)


def part_neighbours(tensors: Tensors, config: GPTConfig) -> None:
    """Reorder the rows of models that rotate adjacent numbers: these become i and i + d_rotated / 2."""
    n = config.d_rotated
    permute_heads(tensors, config, lambda d: np.r_[0:n:2, 1:n:2, n:d])


def root_of_width(width: int) -> dict[str, object]:
    """The factor of Gemma's embeddings, √d_model."""
    return {"embed_scale": float(np.float32(max(width, 1) ** 0.5))}


def add_one(tensors: Tensors) -> None:
    """Add 1 to the weights of norms: Gemma's norms multiply by 1 + w."""
    for name, tensor in tensors.items():
        if "ln" in name or ".qk_norm." in name:
            tensors[name] = mapped(tensor, lambda w: w + 1)


# --- the tables

LLAMA_NAMES = {
    "embed_tokens": "embed",
    "layers.*.input_layernorm": "blocks.*.ln1",
    "layers.*.self_attn.q_proj": "blocks.*.attn.q",
    "layers.*.self_attn.k_proj": "blocks.*.attn.k",
    "layers.*.self_attn.v_proj": "blocks.*.attn.v",
    "layers.*.self_attn.o_proj": "blocks.*.attn.out",
    "layers.*.post_attention_layernorm": "blocks.*.ln2",
    "layers.*.mlp.gate_proj": "blocks.*.mlp.gate",
    "layers.*.mlp.up_proj": "blocks.*.mlp.up",
    "layers.*.mlp.down_proj": "blocks.*.mlp.down",
    "norm": "ln_final",
    "lm_head": "unembed",
}
LLAMA_FIELDS = {
    **COMMON_FIELDS,
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
LLAMA_FIXED = {"norm_kind": "rms", "bias": False, "gated": True}
QK_NORMS = {
    "layers.*.self_attn.q_norm": "blocks.*.attn.qk_norm.q",
    "layers.*.self_attn.k_norm": "blocks.*.attn.qk_norm.k",
}


def llama_more(fields: Fields, source: Source) -> dict[str, object]:
    bias = bool(source.get(fields, "mlp_bias", bool))
    return rope_of(fields, source) | attention_bias(fields, source) | {"mlp_bias": bias}


LLAMA = Family(LLAMA_NAMES, LLAMA_FIELDS, LLAMA_DEFAULTS, LLAMA_FIXED, llama_more)


def mistral_more(fields: Fields, source: Source) -> dict[str, object]:
    return rope_of(fields, source) | windows_of(fields, source, [SLIDING])


MISTRAL = replace(
    LLAMA,
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 131072,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    more=mistral_more,
)


def smollm3_more(fields: Fields, source: Source) -> dict[str, object]:
    interval = source.get(fields, "no_rope_layer_interval", int)
    listed = source.get(fields, "no_rope_layers", list)
    if listed is None and interval:
        listed = [int((i + 1) % interval != 0) for i in layers(fields, source)]
    rope_layers = tuple(bool(each) for each in listed or [])
    window = {}
    if source.get(fields, "use_sliding_window", bool):
        window = windows_of(fields, source, [FULL if each else SLIDING for each in rope_layers])
    return llama_more(fields, source) | window | {"rope_layers": rope_layers}


SMOLLM3 = replace(
    LLAMA,
    defaults=LLAMA_DEFAULTS
    | {
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 128001,
    },
    more=smollm3_more,
)


def qwen_windows(fields: Fields, source: Source) -> dict[str, object]:
    if not source.get(fields, "use_sliding_window", bool):
        return {}
    first = source.get(fields, "max_window_layers", int) or 0
    return windows_of(fields, source, [FULL if i < first else SLIDING for i in layers(fields, source)])


def qwen2_more(fields: Fields, source: Source) -> dict[str, object]:
    return rope_of(fields, source) | qwen_windows(fields, source) | {"qkv_bias": True}


QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "eos_token_id": None,
}
QWEN2 = replace(LLAMA, defaults=QWEN_DEFAULTS, more=qwen2_more)


def qwen3_more(fields: Fields, source: Source) -> dict[str, object]:
    more = rope_of(fields, source) | attention_bias(fields, source) | qwen_windows(fields, source)
    return more | {"qk_norm": "head"}


QWEN3 = replace(
    LLAMA, names=LLAMA_NAMES | QK_NORMS, defaults=QWEN_DEFAULTS | {"head_dim": 128}, more=qwen3_more
)


def phi3_more(fields: Fields, source: Source) -> dict[str, object]:
    share = rotated({"partial_rotary_factor": 1.0, **fields}, source, "partial_rotary_factor")
    return rope_of(fields, source) | share | windows_of(fields, source, [SLIDING])


PHI3 = replace(
    LLAMA,
    names={name: ours for name, ours in LLAMA_NAMES.items() if ours[-2:] not in (".q", ".k", ".v", "up")}
    | {
        "layers.*.self_attn.qkv_proj": "blocks.*.attn.qkv",
        "layers.*.mlp.gate_up_proj": "blocks.*.mlp.gate_up",
    },
    defaults=LLAMA_DEFAULTS
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
    },
    more=phi3_more,
    weights=lambda tensors, config, fields: split_gates(tensors, "gate_up"),
)


def gemma_more(fields: Fields, source: Source) -> dict[str, object]:
    if source.get(fields, "use_bidirectional_attention", bool):
        raise source.refuse("use_bidirectional_attention", True)
    width = source.get(fields, "hidden_size", int) or 0
    return attention_bias(fields, source) | root_of_width(width)


def gemma1_more(fields: Fields, source: Source) -> dict[str, object]:
    return rope_of(fields, source) | gemma_more(fields, source)


GEMMA_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
GEMMA = replace(
    LLAMA, defaults=GEMMA_DEFAULTS, more=gemma1_more, weights=lambda tensors, config, fields: add_one(tensors)
)


def gemma2_more(fields: Fields, source: Source) -> dict[str, object]:
    alternate = [SLIDING if i % 2 == 0 else FULL for i in layers(fields, source)]
    caps = {
        "attention_cap": float(source.get(fields, "attn_logit_softcapping", float) or 0),
        "logit_cap": float(source.get(fields, "final_logit_softcapping", float) or 0),
        "attention_scale": _positive(fields, "query_pre_attn_scalar", source) ** -0.5,
    }
    return gemma1_more(fields, source) | windows_of(fields, source, alternate) | caps


GEMMA2 = replace(
    GEMMA,
    names=LLAMA_NAMES
    | {
        "layers.*.post_attention_layernorm": "blocks.*.ln1_post",
        "layers.*.pre_feedforward_layernorm": "blocks.*.ln2",
        "layers.*.post_feedforward_layernorm": "blocks.*.ln2_post",
    },
    fields={key: name for key, name in LLAMA_FIELDS.items() if key != "hidden_act"}
    | {"hidden_activation": "activation"},
    defaults=GEMMA_DEFAULTS
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed=LLAMA_FIXED | {"norm": "sandwich"},
    more=gemma2_more,
)


def gemma3_more(fields: Fields, source: Source) -> dict[str, object]:
    """The fields of Gemma 3, whose layers with a window have a separate θ."""
    pattern = source.get(fields, "sliding_window_pattern", int) or 6
    found = source.get(fields, "rope_parameters", dict) or {}
    local = source.get(fields, "rope_local_base_freq", float) or 10000.0
    if isinstance(sliding := found.get(SLIDING), dict):
        if sliding.get("rope_type", "default") != "default":
            raise source.refuse("rope_type", sliding["rope_type"])
        local = source.get(sliding, "rope_theta", float) or local
        fields = {**fields, "rope_parameters": found.get(FULL)}
    types = [FULL if (i + 1) % pattern == 0 else SLIDING for i in layers(fields, source)]
    return gemma2_more(fields, source) | windows_of(fields, source, types) | {"local_theta": local}


GEMMA3 = replace(
    GEMMA2,
    names={**GEMMA2.names, **QK_NORMS},
    defaults={**GEMMA2.defaults, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    | {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1000000.0},
    fixed={**GEMMA2.fixed, "qk_norm": "head"},
    more=gemma3_more,
)


def olmo_more(fields: Fields, source: Source) -> dict[str, object]:
    return rope_of(fields, source) | attention_bias(fields, source)


OLMO_DEFAULTS = LLAMA_DEFAULTS | {"vocab_size": 50304, "eos_token_id": 50279}
OLMO = replace(
    LLAMA,
    fields={key: name for key, name in LLAMA_FIELDS.items() if key != "rms_norm_eps"},
    defaults=OLMO_DEFAULTS,
    fixed={"bias": False, "gated": True, "norm_weight": False, "norm_epsilon": 1e-5},
    more=olmo_more,
    required={"clip_qkv": None},
)
OLMO2 = replace(
    LLAMA,
    names={name: ours for name, ours in LLAMA_NAMES.items() if ours != "blocks.*.ln1"}
    | QK_NORMS
    | {
        "layers.*.post_attention_layernorm": "blocks.*.ln1",
        "layers.*.post_feedforward_layernorm": "blocks.*.ln2",
    },
    defaults=OLMO_DEFAULTS | {"rms_norm_eps": 1e-5},
    fixed=LLAMA_FIXED | {"norm": "output", "qk_norm": "all"},
    more=olmo_more,
)


def nanochat_more(fields: Fields, source: Source) -> dict[str, object]:
    cap = float(source.get(fields, "final_logit_softcapping", float) or 0)
    return rope_of(fields, source) | attention_bias(fields, source) | {"logit_cap": cap, "mlp_bias": False}


def nanochat_weights(tensors: Tensors, config: GPTConfig, fields: Fields) -> None:
    """Exchange the halves of heads, as nanochat rotates by −θ, and put the embedding's norm into its rows."""

    def normalised(rows: Array) -> Array:
        wide = rows.astype(np.float64)
        return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + config.norm_epsilon)

    permute_heads(tensors, config, lambda d: np.roll(np.arange(d), d // 2))
    if "embed.weight" in tensors:
        tensors["embed.weight"] = mapped(tensors["embed.weight"], normalised)


NANOCHAT = replace(
    LLAMA,
    names=LLAMA_NAMES | {"layers.*.mlp.fc1": "blocks.*.mlp.up", "layers.*.mlp.fc2": "blocks.*.mlp.down"},
    defaults=LLAMA_DEFAULTS
    | {
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 8192,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "hidden_act": "relu2",
        "final_logit_softcapping": 15.0,
        "eos_token_id": 1,
    },
    fixed={"norm_kind": "rms", "norm_weight": False, "bias": False, "qk_norm": "head_after"},
    more=nanochat_more,
    weights=nanochat_weights,
    required={"tie_word_embeddings": False},  # only the embedding is normalised
)

NEOX_FIELDS = {**COMMON_FIELDS, "layer_norm_eps": "norm_epsilon", "tie_word_embeddings": "tied"}


def neox_more(fields: Fields, source: Source) -> dict[str, object]:
    theta = source.get(fields, "rotary_emb_base", float) or 10000.0
    parallel = source.get(fields, "use_parallel_residual", bool)
    share = rotated(fields, source, "rotary_pct")
    layout = {"layout": "parallel" if parallel else "sequential"}
    return rope_of({"rope_theta": theta, **fields}, source) | attention_bias(fields, source) | share | layout


def neox_weights(tensors: Tensors, config: GPTConfig, fields: Fields) -> None:
    """Reorder the rows of queries, keys and values, which GPT-NeoX has together for each head."""
    H, d = config.n_heads, config.d_head
    order = np.arange(3 * H * d).reshape(H, 3, d).swapaxes(0, 1).reshape(-1)
    for name, tensor in tensors.items():
        if ".attn.qkv." in name and tensor.shape[:1] == (3 * H * d,):
            tensors[name] = selected(tensor, order)


GPT_NEOX = Family(
    names={
        "embed_in": "embed",
        "layers.*.input_layernorm": "blocks.*.ln1",
        "layers.*.attention.query_key_value": "blocks.*.attn.qkv",
        "layers.*.attention.dense": "blocks.*.attn.out",
        "layers.*.post_attention_layernorm": "blocks.*.ln2",
        "layers.*.mlp.dense_h_to_4h": "blocks.*.mlp.up",
        "layers.*.mlp.dense_4h_to_h": "blocks.*.mlp.down",
        "final_layer_norm": "ln_final",
        "embed_out": "unembed",
        "lm_head": "unembed",
    },
    fields=NEOX_FIELDS,
    defaults={
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_pct": 0.25,
        "eos_token_id": 2,
    },
    fixed={},
    more=neox_more,
    weights=neox_weights,
    prefix="gpt_neox.",
)


def phi_more(fields: Fields, source: Source) -> dict[str, object]:
    share = rotated({"partial_rotary_factor": 0.5, **fields}, source, "partial_rotary_factor")
    norm = {"qk_norm": "head"} if source.get(fields, "qk_layernorm", bool) else {}
    return rope_of(fields, source) | share | norm


PHI = Family(
    names={
        "embed_tokens": "embed",
        "layers.*.input_layernorm": "blocks.*.ln1",
        "layers.*.self_attn.q_proj": "blocks.*.attn.q",
        "layers.*.self_attn.k_proj": "blocks.*.attn.k",
        "layers.*.self_attn.v_proj": "blocks.*.attn.v",
        "layers.*.self_attn.dense": "blocks.*.attn.out",
        "layers.*.self_attn.q_layernorm": "blocks.*.attn.qk_norm.q",
        "layers.*.self_attn.k_layernorm": "blocks.*.attn.qk_norm.k",
        "layers.*.mlp.fc1": "blocks.*.mlp.up",
        "layers.*.mlp.fc2": "blocks.*.mlp.down",
        "final_layernorm": "ln_final",
        "lm_head": "unembed",
    },
    fields=NEOX_FIELDS | {"num_key_value_heads": "n_kv_heads"},
    defaults={
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    fixed={"layout": "parallel_one_norm", "head_bias": True},
    more=phi_more,
    required={"tie_word_embeddings": False},  # the head has a bias
)


def gptj_more(fields: Fields, source: Source) -> dict[str, object]:
    own: dict[str, object] = {"positions": "rope"}
    width = source.get(fields, "rotary_dim", int)
    return own if width is None else own | {"d_rotated": width}


GPTJ = Family(
    names={
        "wte": "embed",
        "h.*.ln_1": "blocks.*.ln1",
        "h.*.attn.q_proj": "blocks.*.attn.q",
        "h.*.attn.k_proj": "blocks.*.attn.k",
        "h.*.attn.v_proj": "blocks.*.attn.v",
        "h.*.attn.out_proj": "blocks.*.attn.out",
        "h.*.mlp.fc_in": "blocks.*.mlp.up",
        "h.*.mlp.fc_out": "blocks.*.mlp.down",
        "ln_f": "ln_final",
        "lm_head": "unembed",
    },
    fields={key: name for key, name in GPT2_FIELDS.items() if name != "scale_by_layer"},
    defaults={
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
        "eos_token_id": 50256,
    },
    fixed={"layout": "parallel_one_norm", "qkv_bias": False, "out_bias": False, "head_bias": True},
    more=gptj_more,
    weights=lambda tensors, config, fields: part_neighbours(tensors, config),
    prefix="transformer.",
    required={"tie_word_embeddings": False},  # the head has a bias
)


def neo_more(fields: Fields, source: Source) -> dict[str, object]:
    """The windows of GPT-Neo's layers, from `attention_types`, [[[kinds], times], ...]."""
    windows: list[int] = []
    width = source.get(fields, "window_size", int) or 0
    for each in source.get(fields, "attention_types", list) or []:
        match each:
            case [list(kinds), int(times)] if 0 <= times <= 10_000 and set(map(str, kinds)) <= {
                "global",
                "local",
            }:
                windows += [width if kind == "local" else 0 for kind in kinds] * times
            case _:
                raise source.refuse("attention_types", each)
        if len(windows) > 10_000:
            raise LamaError(f"{source.name} must have at most 10,000 layers; got {len(windows)}")
    return {"windows": tuple(windows)}


GPT_NEO = Family(
    names={
        "wte": "embed",
        "wpe": "pos_embed",
        "h.*.ln_1": "blocks.*.ln1",
        "h.*.attn.attention.q_proj": "blocks.*.attn.q",
        "h.*.attn.attention.k_proj": "blocks.*.attn.k",
        "h.*.attn.attention.v_proj": "blocks.*.attn.v",
        "h.*.attn.attention.out_proj": "blocks.*.attn.out",
        "h.*.ln_2": "blocks.*.ln2",
        "h.*.mlp.c_fc": "blocks.*.mlp.up",
        "h.*.mlp.c_proj": "blocks.*.mlp.down",
        "ln_f": "ln_final",
        "lm_head": "unembed",
    },
    fields={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "context_length",
        "hidden_size": "d_model",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "intermediate_size": "d_mlp",
        "activation_function": "activation",
        "layer_norm_epsilon": "norm_epsilon",
        "tie_word_embeddings": "tied",
    },
    defaults={
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "activation_function": "gelu_new",
        "attention_types": [[["global", "local"], 12]],
        "window_size": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 50256,
    },
    fixed={"qkv_bias": False, "similarity": "dot"},
    more=neo_more,
    prefix="transformer.",
)


def opt_more(fields: Fields, source: Source) -> dict[str, object]:
    if source.get(fields, "_remove_final_layer_norm", bool):
        raise source.refuse("_remove_final_layer_norm", True)
    bias, width = bool(source.get(fields, "enable_bias", bool)), source.get(fields, "hidden_size", int)
    projected = source.get(fields, "word_embed_proj_dim", int) not in (None, width)
    own: dict[str, object] = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bias}
    own["norm"] = "pre" if source.get(fields, "do_layer_norm_before", bool) else "post"
    return own | ({"tied": False} if projected else {})


def floats(tensor: FileTensor) -> Array:
    return read_weights(tensor, "float32")


def opt_weights(tensors: Tensors, config: GPTConfig, fields: Fields) -> None:
    """Drop the first two rows of positions, which are unused, and merge the projections of embeddings."""
    if (table := tensors.get("pos_embed.weight")) is not None and table.shape:
        tensors["pos_embed.weight"] = selected(table, np.arange(2, max(2, table.shape[0])))
    inwards, outwards = tensors.pop("project_in.weight", None), tensors.pop("project_out.weight", None)
    narrow = tensors.get("embed.weight")
    if inwards is None or outwards is None or narrow is None:
        return
    sizes = narrow.shape[-1:]
    if (
        narrow.shape[1:] != sizes
        or inwards.shape != (config.d_model, *sizes)
        or outwards.shape != (*sizes, config.d_model)
    ):
        raise LamaError(
            f"projections must fit the embedding; got {inwards.shape}, {outwards.shape}, {narrow.shape}"
        )
    head = tensors.get("unembed.weight", narrow)
    tensors["embed.weight"] = mapped(narrow, lambda rows: rows @ floats(inwards).T, config.d_model)
    tensors["unembed.weight"] = mapped(head, lambda rows: rows @ floats(outwards), config.d_model)


OPT = Family(
    names={
        "decoder.embed_tokens": "embed",
        "decoder.embed_positions": "pos_embed",
        "decoder.project_in": "project_in",
        "decoder.project_out": "project_out",
        "decoder.layers.*.self_attn_layer_norm": "blocks.*.ln1",
        "decoder.layers.*.self_attn.q_proj": "blocks.*.attn.q",
        "decoder.layers.*.self_attn.k_proj": "blocks.*.attn.k",
        "decoder.layers.*.self_attn.v_proj": "blocks.*.attn.v",
        "decoder.layers.*.self_attn.out_proj": "blocks.*.attn.out",
        "decoder.layers.*.final_layer_norm": "blocks.*.ln2",
        "decoder.layers.*.fc1": "blocks.*.mlp.up",
        "decoder.layers.*.fc2": "blocks.*.mlp.down",
        "decoder.final_layer_norm": "ln_final",
        "lm_head": "unembed",
    },
    fields={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "context_length",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "ffn_dim": "d_mlp",
        "activation_function": "activation",
        "layer_norm_elementwise_affine": "norm_weight",
        "tie_word_embeddings": "tied",
    },
    defaults={
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    },
    fixed={},
    more=opt_more,
    weights=opt_weights,
)

FAMILIES: dict[str, Family] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt_neo": GPT_NEO,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "nanochat": NANOCHAT,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
}


def config_from_family(
    family: Family, fields: Fields, source: object = "config.json", generation: Fields | None = None
) -> GPTConfig:
    """The model that a `config.json` of this family describes. Raises LamaError."""
    given = {**family.defaults, **fields}
    required = {"quantization_config": None, **family.required}
    ours = read_fields(given, family.fields, required, GPTConfig, source, {})
    own = {**ours, **family.fixed, **family.more(given, Source(source))}
    config = checked_config(GPTConfig, own, source)
    ends = end_tokens(given, generation, source)
    return replace(config, end_tokens=tuple(i for i in ends if 0 <= i < config.vocab_size))


def translate_family(
    family: Family, tensors: Mapping[str, FileTensor], config: GPTConfig, fields: Fields, source: object
) -> Tensors:
    """Translate a family's tensors to lama's names and layout. Raises LamaError.

    Unknown tensors keep their names, so that `filled` refuses them. Buffers, heads for other tasks and the
    output layer of a tied model, which must equal the embedding, are left out.
    """

    def lama_name(name: str) -> str | None:
        return rename(name.removeprefix(family.prefix), family.names)

    learned = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    ours = renamed(learned, lama_name, HEADS, source)
    if config.tied:
        advice = ". Set tie_word_embeddings to false in its config.json"
        tie(ours, "unembed.weight", "embed.weight", source, advice)
    family.weights(ours, config, {**family.defaults, **fields})
    join_qkv(ours)
    return ours


def name_in_family(family: Family) -> Callable[[str], str]:
    """A function from lama's name of a tensor to the family's, for error messages."""
    theirs = {ours: name for name, ours in family.names.items()}

    def name_of(name: str) -> str:
        found = rename(name, theirs) or rename(name.replace(".attn.qkv.", ".attn.q."), theirs)
        if found is None:
            return name
        return found if found.startswith(("lm_head", "embed_out")) else family.prefix + found

    return name_of


# --- writing

FORMS = {("none", False): "llama", ("none", True): "qwen2", ("head", False): "qwen3"}
"""The model_type of models with Llama's architecture, by qk_norm and qkv_bias."""
SIZES = (
    *("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp"),
    *("norm_epsilon", "tied", "rope_theta", "rope_scaling"),
)


def form_of(c: GPTConfig) -> str | None:
    """The model_type llama, qwen2 or qwen3 that computes the same as this model; None if there is none."""
    if c.positions != "rope":
        return None
    shape: dict[str, object] = {name: getattr(c, name) for name in SIZES}
    shape |= {**LLAMA_FIXED, "activation": "silu", "positions": "rope"}
    for (qk_norm, qkv_bias), form in FORMS.items():
        own = {**shape, "qk_norm": qk_norm, "qkv_bias": qkv_bias}
        if vars(c) | {"end_tokens": ()} == vars(config_from_dict(GPTConfig, own)):
            return form
    return None


def config_of_form(c: GPTConfig, form: str, end_of_text: int | None) -> dict[str, object]:
    """The config.json of a model of one of FORMS, in the spelling of transformers 4, which 5 also reads."""
    scaling: dict[str, object] | None = None
    if len(c.rope_scaling) == 1:
        scaling = {"rope_type": "linear", "factor": c.rope_scaling[0]}
    elif c.rope_scaling:
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {"rope_type": "llama3", **dict(zip(keys, c.rope_scaling, strict=True))}
    ends = [token for token in dict.fromkeys([end_of_text, *c.end_tokens]) if token is not None]
    return {
        "model_type": form,
        "architectures": [f"{form.capitalize()}ForCausalLM"],
        **{theirs: getattr(c, ours) for theirs, ours in FAMILIES[form].fields.items()},
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "bos_token_id": end_of_text,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def tensors_of_form(tensors: Tensors, c: GPTConfig, form: str) -> Tensors:
    """The tensors, given under lama's names, with the names and layout of the form."""
    ours, name_of = dict(tensors), name_in_family(FAMILIES[form])
    split_qkv(ours, c)
    return {name_of(name): tensor for name, tensor in ours.items()}
