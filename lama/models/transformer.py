"""The former name of `lama.models.encoder_decoder`, which scripts outside lama import."""

from lama.models.encoder_decoder import Transformer, TransformerConfig

__all__ = ["Transformer", "TransformerConfig"]
