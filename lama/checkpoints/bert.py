"""Hugging Face's BERT checkpoints with a masked-language-model head: their config, and the table of names."""

from collections.abc import Mapping

from lama.checkpoints.families import join_qkv
from lama.checkpoints.huggingface import COMMON_FIELDS, checked_config, read_fields, rename, renamed, tie
from lama.checkpoints.tensor import FileTensor
from lama.files import field
from lama.models.bert import BertConfig

# BERT's layer names -> lama's; `*` is the number of the block.
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
HEADS = ("bert.pooler.", "cls.seq_relationship.", "classifier.", "qa_outputs.")  # of other tasks
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
DECODER = "cls.predictions.decoder"  # another name for the unembedding, which is tied to the embedding
TENSORFLOW = {"gamma": "weight", "beta": "bias"}  # names of norms in early conversions

# Keys of BERT's config -> fields of lama's.
FIELDS = {
    **COMMON_FIELDS,
    "layer_norm_eps": "norm_epsilon",
    "type_vocab_size": "segments",
    "pad_token_id": "pad",
}
# Keys that would change the results, and the value that lama supports.
REQUIRED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def config_from_bert(fields: Mapping[str, object], source: object = "config.json") -> BertConfig:
    """The encoder that a Hugging Face `config.json` describes; BERT's base model gives missing fields.

    Raises LamaError.
    """
    ours = read_fields(fields, FIELDS, REQUIRED, BertConfig, source, {})
    vocab_size = field(ours, "vocab_size", int, source, BertConfig.vocab_size)
    mask = max(0, min(BertConfig.mask, vocab_size - 1))  # configs do not contain it
    return checked_config(BertConfig, {"d_mlp": 3072, **ours, "mask": mask}, source)


def lama_name(name: str) -> str | None:
    """lama's name for a tensor of a BERT file, with separate queries, keys and values; None if unknown."""
    if name == BIAS:
        return "unembed_bias"
    layer, _, parameter = name.rpartition(".")
    return rename(f"{layer}.{TENSORFLOW.get(parameter, parameter)}", NAMES)


def translate_bert(tensors: Mapping[str, FileTensor], source: object) -> dict[str, FileTensor]:
    """Translate a BERT file's tensors to lama's names, with joined queries, keys and values.

    Unknown tensors keep their names, so that `filled` refuses them. Buffers, other heads and tied tensors,
    which must equal their counterparts, are left out. Raises LamaError.
    """
    found = renamed(tensors, lama_name, HEADS, source)
    for name in BUFFERS:
        found.pop(name, None)
    tie(found, f"{DECODER}.weight", "encoder.embed.weight", source)
    if (bias := found.pop(f"{DECODER}.bias", None)) is not None:
        found.setdefault("unembed_bias", bias)
    join_qkv(found)
    return found


def bert_name(name: str) -> str:
    """BERT's name for a tensor of lama's: `dense.weight` -> `cls.predictions.transform.dense.weight`."""
    return BIAS if name == "unembed_bias" else rename(name.replace(".qkv.", ".q."), OURS) or name
