"""Embeddings of texts: the mean of a model's last hidden states."""

from collections.abc import Sequence

import numpy as np

from lama.errors import LamaError
from lama.generation.engine import check_prompt
from lama.models.gpt import GPT
from lama.server.inside import normalised
from lama.server.steps import text_stream
from lama.shapes import Array


def embed(model: GPT, tokens: Sequence[int]) -> Array:
    """The mean of the unembedding's input over all tokens, scaled to length 1: (d_model,) float32.

    Raises UsageError without tokens and for more than the context, LamaError for numbers that are not finite.
    """
    check_prompt(tokens, model.config.context_length, False)
    *_, (x, _) = text_stream(model, tokens)
    mean = normalised(model, x)[: len(tokens)].mean(0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    if not np.isfinite(length):
        raise LamaError(f"hidden states must be finite; got {length}. Try --dtype float32")
    return (mean / (length or 1)).astype(np.float32)
