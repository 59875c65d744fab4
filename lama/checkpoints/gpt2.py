"""Hugging Face's GPT-2 checkpoints: their config, and the table of their names."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lama.checkpoints.huggingface import checked_config, end_tokens, read_fields, rename, renamed, tie
from lama.checkpoints.tensor import NUMPY, TRANSPOSED_ROWS, FileTensor
from lama.errors import LamaError
from lama.files import checked
from lama.models.gpt import GPTConfig
from lama.shapes import Array

# GPT-2's layer names -> lama's; `*` is the number of the block.
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
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D has (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, a buffer that is not learned
# Heads of transformers for other tasks, and TRL's.
HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.")
PREFIX = "transformer."

# Keys of GPT-2's config -> fields of lama's.
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
# Keys that would change the results, and the value that lama supports. Other keys do not change them.
REQUIRED = {
    "model_type": "gpt2",
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}


def config_from_huggingface(
    fields: Mapping[str, object],
    source: object = "config.json",
    generation: Mapping[str, object] | None = None,
) -> GPTConfig:
    """The model that a Hugging Face `config.json` describes; missing fields are those of GPT-2 124M.

    `generation` is the content of generation_config.json, whose end tokens take precedence. Raises LamaError
    for the first key that lama does not support or cannot read.
    """
    ours = read_fields(fields, FIELDS, REQUIRED, GPTConfig, source, SYNONYMS)
    if not checked(fields.get("scale_attn_weights", True), bool, f"scale_attn_weights in {source}"):
        ours["similarity"] = "dot"
    config = checked_config(GPTConfig, ours, source)
    ends = end_tokens(fields, generation, source)
    return replace(config, end_tokens=tuple(i for i in ends if 0 <= i < config.vocab_size))


def huggingface_config(config: GPTConfig, end_of_text: int | None = None) -> dict[str, object]:
    """The `config.json` of a model: the inverse of `config_from_huggingface`.

    `end_of_text` is the tokenizer's. Raises LamaError for a model that is not a GPT-2.
    """
    shared = {ours: getattr(config, ours) for ours in FIELDS.values()}
    gpt2 = GPTConfig(**shared, similarity=config.similarity, end_tokens=config.end_tokens)
    for field in dataclasses.fields(config):
        wanted, found = getattr(gpt2, field.name), getattr(config, field.name)
        if found != wanted and field.name not in shared:
            raise LamaError(f"a GPT-2 model must have {field.name}={wanted!r}; got {found!r}")
    if config.similarity not in ("scaled_dot", "dot"):
        raise LamaError(f"a GPT-2 model must have similarity scaled_dot or dot; got {config.similarity!r}")
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    ends = [token for token in dict.fromkeys([end_of_text, *config.end_tokens]) if token is not None]
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **fields,
        "scale_attn_weights": config.similarity == "scaled_dot",
        "bos_token_id": end_of_text,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def lama_name(name: str) -> str | None:
    """lama's name for a tensor of a GPT-2 file; None for a tensor that GPT-2 does not have.

    `transformer.h.3.ln_1.weight` -> `blocks.3.ln1.weight`
    """
    return rename(name.removeprefix(PREFIX), NAMES)


def gpt2_name(name: str) -> str:
    """GPT-2's name, without prefix, of a tensor of lama's: `blocks.3.ln1.weight` -> `h.3.ln_1.weight`."""
    return rename(name, OURS) or name


def translate(
    tensors: Mapping[str, FileTensor], config: GPTConfig, source: object, conv1d: bool = True
) -> dict[str, FileTensor]:
    """Translate a GPT-2 file's tensors to lama's names and layout. Raises LamaError.

    Unknown tensors keep their names, so that `filled` refuses them. Masks, heads for other tasks and the
    output layer of a tied model, which must equal the embedding, are left out. `conv1d`: whether matrices are
    (in, out).
    """
    ours: dict[str, FileTensor] = {}
    for name, tensor in renamed(tensors, lama_name, HEADS, source).items():
        if not name.endswith(MASKS):
            is_conv1d = conv1d and gpt2_name(name).endswith(TRANSPOSED)
            ours[name] = transposed(tensor) if is_conv1d else tensor
    if config.tied:
        advice = ". Set tie_word_embeddings to false in its config.json"
        tie(ours, "unembed.weight", "embed.weight", source, advice)
    return ours


def with_biases(tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """The tensors of a GPT-2, under lama's names, with zeros for each bias that it lacks."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if parameter == "weight" and layer not in ("embed", "pos_embed", "unembed"):
            dtype = "float32" if tensor.quantized else tensor.dtype
            zeros: Array = np.zeros(tensor.shape[0], NUMPY[dtype])
            found.setdefault(f"{layer}.bias", FileTensor(name, dtype, zeros.shape, zeros.copy))
    return found


def transposed(tensor: FileTensor) -> FileTensor:
    """The same matrix with its axes exchanged."""
    return replace(
        tensor,
        shape=tensor.shape[::-1],
        read=lambda: _transpose(tensor.read()),
        transposed=not tensor.transposed,
    )


def _transpose(matrix: Array) -> Array:
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, len(matrix), TRANSPOSED_ROWS):
        out[:, row : row + TRANSPOSED_ROWS] = matrix[row : row + TRANSPOSED_ROWS].T
    return out
