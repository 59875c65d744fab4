"""Hugging Face's GPT-2 checkpoints: their config, and the one table of their names."""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from lama.checkpoints.stored import TRANSPOSED_ROWS, StoredTensor, read_weights
from lama.errors import LamaError
from lama.models.gpt import GPTConfig

# GPT-2's layers and lama's; `*` stands for the number of the block.
NAMES = {
    "wte": "embed",
    "wpe": "pos_embed",
    "h.*.ln_1": "blocks.*.ln1",
    "h.*.attn.c_attn": "blocks.*.attn.qkv",
    "h.*.attn.c_proj": "blocks.*.attn.out",
    "h.*.ln_2": "blocks.*.ln2",
    "h.*.mlp.c_fc": "blocks.*.mlp.up",
    "h.*.mlp.c_proj": "blocks.*.mlp.down",
    "ln_f": "ln_final",
    "lm_head": "unembed",
}
OURS = {ours: theirs for theirs, ours in NAMES.items()}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D: stored as (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, kept as a buffer: nothing learned
PREFIX = "transformer."

# GPT-2's config and lama's.
FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "d_model",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_inner": "d_mlp",
    "layer_norm_epsilon": "norm_epsilon",
    "activation_function": "activation",
    "tie_word_embeddings": "tied",
}
SYNONYMS = {
    "n_ctx": "n_positions",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}
# What would change the numbers and lama does not do: each key with the value that it must have where it is present.
# All other keys (dropout rates, token ids, versions, ...) change nothing when the model is run.
REQUIRED = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}


def config_from_huggingface(fields: Mapping[str, Any], source: object = "config.json") -> GPTConfig:
    """The model that a Hugging Face `config.json` describes; what it leaves out is as in GPT-2 124M.

    Raises LamaError naming the first key that lama does not support or cannot read.
    """
    for key, value in REQUIRED.items():
        if fields.get(key, value) != value:
            raise LamaError(f"{source} must have {key}={value!r}; got {fields[key]!r}, which lama does not support")
    ours: dict[str, Any] = {}
    for key, value in fields.items():
        name = FIELDS.get(SYNONYMS.get(key, key))
        if name is None or (key == "n_inner" and value is None):
            continue
        wanted = type(getattr(GPTConfig, name))
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise LamaError(f"{source} must have a {wanted.__name__} for {key}; got {value!r}")
        if key == "activation_function":
            if value not in ACTIVATIONS:
                raise LamaError(f"{source} must have activation_function among {', '.join(ACTIVATIONS)}; got {value!r}")
            value = ACTIVATIONS[value]
        if ours.setdefault(name, value) != value:
            raise LamaError(f"{source} must give {name} one value; got {ours[name]!r} and {value!r} for {key}")
    try:
        return GPTConfig(**ours)
    except ValueError as error:
        raise LamaError(f"{source}: {error}") from error


def huggingface_config(config: GPTConfig) -> dict[str, Any]:
    """The `config.json` of a model, the inverse of `config_from_huggingface`. Raises LamaError if GPT-2 has no such model."""
    gpt2 = GPTConfig()
    for name in ("bias", "norm", "positions", "similarity", "residual", "mlp"):
        if getattr(config, name) != getattr(gpt2, name):
            raise LamaError(f"a GPT-2 model must have {name}={getattr(gpt2, name)!r}; got {getattr(config, name)!r}")
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **fields}


def lama_name(name: str) -> str | None:
    """lama's name for a tensor of a GPT-2 file; None for one that GPT-2 does not have.

    `transformer.h.3.ln_1.weight` -> `blocks.3.ln1.weight`
    """
    return _rename(name.removeprefix(PREFIX), NAMES)


def gpt2_name(name: str) -> str:
    """GPT-2's name, without the prefix, for a tensor of lama's: `blocks.3.ln1.weight` -> `h.3.ln_1.weight`."""
    return _rename(name, OURS) or name


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    layer, _, parameter = name.rpartition(".")
    parts = layer.split(".")
    number = parts[1] if len(parts) > 1 and parts[1].isdecimal() else ""
    pattern = ".".join(["*" if number and i == 1 else part for i, part in enumerate(parts)])
    return f"{table[pattern].replace('*', number)}.{parameter}" if pattern in table else None


def translate(tensors: Mapping[str, StoredTensor], config: GPTConfig, source: object) -> dict[str, StoredTensor]:
    """A GPT-2 file's tensors under lama's names and in lama's layout; unknown ones keep theirs, for `fill` to refuse.

    Masks are left out, and so is the output layer of a tied model, which must equal the embedding. Raises LamaError.
    """
    ours: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(MASKS):
            continue
        key = lama_name(name) or name
        if key in ours:
            raise LamaError(f"{source} must hold each tensor once; got {ours[key].name} and {name}")
        ours[key] = transposed(tensor) if name.endswith(TRANSPOSED) else tensor
    if config.tied and "unembed.weight" in ours:
        head = ours.pop("unembed.weight")
        if "embed.weight" in ours and not _equal(head, ours["embed.weight"]):
            raise LamaError(
                f"{source} must have {head.name} equal to {ours['embed.weight'].name} in a tied model; got different numbers. "
                "Set tie_word_embeddings to false in its config.json"
            )
    return ours


def transposed(tensor: StoredTensor) -> StoredTensor:
    """The same matrix with its axes exchanged."""
    return replace(tensor, shape=tensor.shape[::-1], read=lambda: _transpose(tensor.read()), transposed=not tensor.transposed)


def _transpose(matrix: np.ndarray) -> np.ndarray:
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, len(matrix), TRANSPOSED_ROWS):
        out[:, row : row + TRANSPOSED_ROWS] = matrix[row : row + TRANSPOSED_ROWS].T
    return out


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Compared by digest, so that only one of them is in memory at a time."""
    if a.shape != b.shape:
        return False
    return _digest(a) == _digest(b)


def _digest(tensor: StoredTensor) -> bytes:
    return sha256(read_weights(tensor, "float32").reshape(-1).view(np.uint8).data).digest()
