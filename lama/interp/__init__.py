"""Inspect models: results as arrays and strings. The command line writes the files.

The choices below stand here, where the command line can read them without importing tinygrad.
"""

ATTENTION_KINDS = ("self", "encoder", "decoder", "cross")
"""Self-attention of a model with one stack; an encoder-decoder's encoder, decoder and cross-attention."""

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
"""Activations to patch, with their names in a block.

The residual stream before, inside and after the block, the output of attention or MLP, and each head's
output.
"""
