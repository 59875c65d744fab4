"""Inspect models: results as arrays and strings. The names here need no import of tinygrad."""

ATTENTION_KINDS = ("self", "encoder", "decoder", "cross")
"""Self-attention of a model with one stack; the three of an encoder-decoder."""

MEASURES = ("mass", "mul", "abs")
"""Ways to compare a pattern with a target; see `lama.interp.heads.match`."""

SITES = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "z": "attn.z",
}
"""Activations to patch, with their names in a block."""
