"""Hugging Face's BERT checkpoints, those with the masked-language-model head: their config, and the one table of their names."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lama.checkpoints.huggingface import read_fields, renamed, tie, without_heads
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
HEADS = ("bert.pooler.", "cls.seq_relationship.", "classifier.", "qa_outputs.")  # for other tasks than masked tokens
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
DECODER = "cls.predictions.decoder"  # another name for the unembedding, which is tied to the embedding
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
    ours = read_fields(fields, FIELDS, REQUIRED, BertConfig, source, {})
    ours["mask"] = max(0, min(BertConfig.mask, ours.get("vocab_size", BertConfig.vocab_size) - 1))  # no config names it
    try:
        return BertConfig(**{"d_mlp": 3072} | ours)
    except ValueError as error:
        raise LamaError(f"{source}: {error}") from error


def lama_name(name: str) -> str | None:
    """lama's name for a tensor of a BERT file, its queries, keys and values still apart; None for one that lama does not have."""
    if name == BIAS:
        return "unembed_bias"
    layer, _, parameter = name.rpartition(".")
    number = re.search(r"\.layer\.(\d+)\.", name)
    ours = NAMES.get(layer if number is None else layer.replace(f".{number[1]}.", ".*.", 1))
    if ours is None:
        return None
    return f"{ours if number is None else ours.replace('*', number[1])}.{TENSORFLOW.get(parameter, parameter)}"


def translate_bert(tensors: Mapping[str, StoredTensor], source: object) -> dict[str, StoredTensor]:
    """A BERT file's tensors under lama's names, queries, keys and values in one; unknown ones keep theirs, for `fill` to refuse.

    Buffers, heads for other tasks and what is tied to other tensors, and must equal these, are left out. Raises LamaError.
    """
    found = without_heads(renamed(tensors, lama_name, source), HEADS, source)
    found = {name: tensor for name, tensor in found.items() if name not in BUFFERS}
    tie(found, f"{DECODER}.weight", "encoder.embed.weight", source)
    if (bias := found.pop(f"{DECODER}.bias", None)) is not None:
        found.setdefault("unembed_bias", bias)
    for name in [name for name in found if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        parts = [found.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        there = [part for part in parts if part is not None and part.shape]
        if len(there) == 3 and len({(part.shape, part.dtype) for part in there}) == 1:
            found[name.replace(".q.", ".qkv.")] = joined(there)
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
