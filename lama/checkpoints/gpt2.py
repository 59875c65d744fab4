"""Hugging Face's GPT-2 checkpoints: their config, and the one table of their names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lama.checkpoints.huggingface import read_fields, renamed, tie, without_heads
from lama.checkpoints.stored import TRANSPOSED_ROWS, StoredTensor
from lama.errors import LamaError
from lama.files import checked
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
HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.")  # transformers' for other tasks, and TRL's
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
    "scale_attn_by_inverse_layer_idx": "scale_by_layer",
}
SYNONYMS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# What would change the numbers and lama does not do: each key with the value that it must have where it is present.
# All other keys (dropout rates, n_ctx, versions, ...) change nothing when the model is run.
REQUIRED = {
    "model_type": "gpt2",
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}


def config_from_huggingface(
    fields: Mapping[str, Any], source: object = "config.json", generation: Mapping[str, Any] | None = None
) -> GPTConfig:
    """The model that a Hugging Face `config.json` describes; what it leaves out is as in GPT-2 124M.

    `generation`: the content of generation_config.json, whose end tokens count before those of `config.json`.
    Raises LamaError naming the first key that lama does not support or cannot read.
    """
    ours = read_fields(fields, FIELDS, REQUIRED, GPTConfig, source, SYNONYMS)
    if not checked(fields.get("scale_attn_weights", True), bool, f"scale_attn_weights in {source}"):
        ours["similarity"] = "dot"
    ends = [each for each in (generation or {}, fields) if each.get("eos_token_id") is not None]
    tokens = _end_tokens(ends[0]["eos_token_id"], "generation_config.json" if ends[0] is generation else source) if ends else ()
    try:
        config = GPTConfig(**ours)
        return replace(config, end_tokens=tuple(token for token in tokens if 0 <= token < config.vocab_size))
    except ValueError as error:
        raise LamaError(f"{source}: {error}") from error


def _end_tokens(value: Any, source: object) -> tuple[int, ...]:
    """One id or a list of ids. Raises LamaError."""
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(checked(each, int, f"eos_token_id in {source}") for each in values))


def huggingface_config(config: GPTConfig, end_of_text: int | None = None) -> dict[str, Any]:
    """The `config.json` of a model, the inverse of `config_from_huggingface`; `end_of_text` is the tokenizer's.

    Raises LamaError if GPT-2 has no such model.
    """
    gpt2 = GPTConfig()
    for name in ("bias", "norm", "positions", "residual", "mlp"):
        if getattr(config, name) != getattr(gpt2, name):
            raise LamaError(f"a GPT-2 model must have {name}={getattr(gpt2, name)!r}; got {getattr(config, name)!r}")
    if config.similarity not in ("scaled_dot", "dot"):
        raise LamaError(f"a GPT-2 model must have similarity scaled_dot or dot; got {config.similarity!r}")
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    ends = list(dict.fromkeys([*([] if end_of_text is None else [end_of_text]), *config.end_tokens]))
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **fields,
        "scale_attn_weights": config.similarity == "scaled_dot",
        "bos_token_id": end_of_text,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


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


def translate(tensors: Mapping[str, StoredTensor], config: GPTConfig, source: object, conv1d: bool = True) -> dict[str, StoredTensor]:
    """A GPT-2 file's tensors under lama's names and in lama's layout; unknown ones keep theirs, for `fill` to refuse.

    Masks and heads for other tasks are left out, and so is the output layer of a tied model, which must equal the embedding.
    With `conv1d` matrices are stored as (in, out). Raises LamaError.
    """
    ours = {
        name: transposed(tensor) if conv1d and gpt2_name(name).endswith(TRANSPOSED) else tensor
        for name, tensor in without_heads(renamed(tensors, lama_name, source), HEADS, source).items()
        if not name.endswith(MASKS)
    }
    if config.tied:
        tie(ours, "unembed.weight", "embed.weight", source, ". Set tie_word_embeddings to false in its config.json")
    return ours


def transposed(tensor: StoredTensor) -> StoredTensor:
    """The same matrix with its axes exchanged."""
    return replace(tensor, shape=tensor.shape[::-1], read=lambda: _transpose(tensor.read()), transposed=not tensor.transposed)


def _transpose(matrix: np.ndarray) -> np.ndarray:
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, len(matrix), TRANSPOSED_ROWS):
        out[:, row : row + TRANSPOSED_ROWS] = matrix[row : row + TRANSPOSED_ROWS].T
    return out
