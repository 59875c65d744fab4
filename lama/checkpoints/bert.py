"""Hugging Face's BERT checkpoints, those with the masked-language-model head: their config, and the one table of their names."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lama.checkpoints.stored import StoredTensor
from lama.errors import LamaError
from lama.models.bert import BertConfig

# BERT's layers and lama's; `*` stands for the number of the block.
NAMES = {
    "bert.embeddings.word_embeddings": "encoder.embed",
    "bert.embeddings.position_embeddings": "encoder.pos_embed",
    "bert.embeddings.token_type_embeddings": "encoder.segment_embed",
    "bert.embeddings.LayerNorm": "encoder.ln_embed",
    "bert.encoder.layer.*.attention.self.query": "encoder.blocks.*.attn.q",
    "bert.encoder.layer.*.attention.self.key": "encoder.blocks.*.attn.k",
    "bert.encoder.layer.*.attention.self.value": "encoder.blocks.*.attn.v",
    "bert.encoder.layer.*.attention.output.dense": "encoder.blocks.*.attn.out",
    "bert.encoder.layer.*.attention.output.LayerNorm": "encoder.blocks.*.ln1",
    "bert.encoder.layer.*.intermediate.dense": "encoder.blocks.*.mlp.up",
    "bert.encoder.layer.*.output.dense": "encoder.blocks.*.mlp.down",
    "bert.encoder.layer.*.output.LayerNorm": "encoder.blocks.*.ln2",
    "cls.predictions.transform.dense": "dense",
    "cls.predictions.transform.LayerNorm": "ln_head",
}
OURS = {ours: theirs for theirs, ours in NAMES.items()}
BIAS = "cls.predictions.bias"  # of the unembedding
# The head for pairs of sentences, what is tied to other tensors, and buffers: lama has none of them.
LEFT_OUT = ("bert.pooler.", "cls.seq_relationship.", "cls.predictions.decoder.", "bert.embeddings.position_ids")
TENSORFLOW = {"gamma": "weight", "beta": "bias"}  # as the first conversions call a norm's

# BERT's config and lama's.
FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_mlp",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_epsilon",
    "type_vocab_size": "segments",
    "pad_token_id": "pad",
}
# What would change the numbers and lama does not do: each key with the value that it must have where it is present.
REQUIRED = {"position_embedding_type": "absolute", "is_decoder": False, "tie_word_embeddings": True, "add_cross_attention": False}


def is_bert(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") == "bert"


def config_from_bert(fields: Mapping[str, Any], source: object = "config.json") -> BertConfig:
    """The encoder that a Hugging Face `config.json` describes; what it leaves out is as in BERT's base model. Raises LamaError."""
    for key, value in REQUIRED.items():
        if fields.get(key, value) != value:
            raise LamaError(f"{source} must have {key}={value!r}; got {fields[key]!r}, which lama does not support")
    try:
        ours = {FIELDS[key]: value for key, value in fields.items() if key in FIELDS}
        ours["mask"] = min(BertConfig.mask, int(ours.get("vocab_size", BertConfig.vocab_size)) - 1)  # no config names it
        return BertConfig(**ours | {"d_mlp": ours.get("d_mlp", 3072)})
    except (TypeError, ValueError) as error:
        raise LamaError(f"{source}: {error}") from error


def translate_bert(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A BERT file's tensors under lama's names, queries, keys and values in one; unknown ones keep theirs, for `fill` to refuse."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(LEFT_OUT):
            continue
        layer, _, parameter = name.rpartition(".")
        number = re.search(r"\.layer\.(\d+)\.", name)
        pattern = layer if number is None else layer.replace(f".{number[1]}.", ".*.", 1)
        if name == BIAS:
            found["unembed_bias"] = tensor
        elif pattern in NAMES:
            ours = NAMES[pattern] if number is None else NAMES[pattern].replace("*", number[1])
            found[f"{ours}.{TENSORFLOW.get(parameter, parameter)}"] = tensor
        else:
            found[name] = tensor
    for name in [name for name in found if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        parts = [found.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        if all(part is not None and part.shape == found[name].shape and part.dtype == found[name].dtype for part in parts):
            found[name.replace(".q.", ".qkv.")] = joined([part for part in parts if part is not None])
            for part in "qkv":
                del found[name.replace(".attn.q.", f".attn.{part}.")]
    return found


def joined(parts: list[StoredTensor]) -> StoredTensor:
    """Equal parts one below the other."""
    first = parts[0]
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    return replace(first, shape=shape, read=lambda: np.concatenate([part.read() for part in parts]), read_into=None)


def bert_name(name: str) -> str:
    """BERT's name for a tensor of lama's: `encoder.blocks.3.ln1.weight` -> `bert.encoder.layer.3.attention.output.LayerNorm.weight`."""
    if name == "unembed_bias":
        return BIAS
    layer, _, parameter = name.replace(".qkv.", ".q.").rpartition(".")
    number = re.search(r"\.blocks\.(\d+)\.", name)
    theirs = OURS[layer if number is None else layer.replace(f".{number[1]}.", ".*.", 1)]
    return f"{theirs if number is None else theirs.replace('*', number[1])}.{parameter}"
