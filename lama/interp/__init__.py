"""Inspect models. Results are arrays and strings. The constants in this file need no import of tinygrad."""

ATTENTION_KINDS = ("self", "encoder", "decoder", "cross")
"""Kinds of attention: that of a model with one stack, and the three of an encoder-decoder."""

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
