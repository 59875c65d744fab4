"""Captured runs of a model over one whole text, for the lens, attention and embeddings of a server.

tinygrad takes a second to work out a run of 30 layers that computes for a tenth of that. So each of these is
captured once for a few widths, to which texts are padded, and saved on disk for the next process.
"""

from collections.abc import Callable, Sequence

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.generation.decoder import Step, bucket, buffers, rope_tables
from lama.masks import Causal
from lama.models.gpt import GPT
from lama.ops import embedding
from lama.runtime.replay import CachedStep
from lama.shapes import Array
from lama.taps import Recorder, scoped

SMALLEST = 64  # tokens of a width: a shorter run is hardly faster, and each width is captured

TextFunction = Callable[[GPT, Tensor, Tensor], Tensor]
"""A function of a model, tokens (1, T) and a whole number (1,)."""


class TextSteps:
    """The captured runs of one model, by function and width. Not thread-safe."""

    def __init__(self, model: GPT):
        self.model, self.weights = model, buffers(model)
        self._steps: dict[tuple[TextFunction, int], Step] = {}

    def __call__(self, function: TextFunction, tokens: Sequence[int], number: int) -> Array:
        """The function's result in float32 for these tokens, padded at the end."""
        padded = padded_to_width(tokens, self.model.config.context_length)
        key = function, padded.shape[1]
        if key not in self._steps:
            inputs: dict[str, tuple[int, ...]] = {"tokens": padded.shape, "number": (1,)}
            state = get_state_dict(self.model) | rope_tables(self.model, key[1])
            name = f"{function.__name__} {self.model.config}"
            self._steps[key] = CachedStep(self._captured(function), inputs, state, name)
        return self._steps[key](tokens=padded, number=np.array([number]))

    def _captured(self, function: TextFunction) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda tokens, number: function(self.model, tokens, number).cast(dtypes.float32).realize()


_last: list[TextSteps] = []  # those of one model are kept


def run_text(model: GPT, function: TextFunction, tokens: Sequence[int], number: int) -> Array:
    """The function's result in float32 for a text of at most the model's context_length."""
    if not (_last and _last[0].model is model and _last[0].weights == buffers(model)):
        _last[:] = [TextSteps(model)]
    return _last[0](function, tokens, number)


def padded_to_width(tokens: Sequence[int], most: int) -> Array:
    """Tokens as (1, T) int32, padded to one of few widths, at the end, where no token sees it."""
    padded = np.zeros((1, bucket(max(len(tokens), SMALLEST), most)), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded


def mean_hidden(model: GPT, tokens: Tensor, number: Tensor) -> Tensor:
    """The mean of the unembedding's input over the first `number` tokens: (d_model,)."""
    x = model.hidden(tokens)  # (1, T, d_model)
    is_text = (Tensor.arange(int(tokens.shape[1])) < number).reshape(1, -1, 1)
    return is_text.where(x, 0).sum(1).squeeze(0) / number.float()


def stage_logits(model: GPT, tokens: Tensor, number: Tensor) -> Tensor:
    """Logits of the stream at place `number` after the embedding and each layer: (stages, vocab_size)."""
    x = model.embedded(tokens)
    rows = [_rows(x, number)]
    for block in model.blocks:
        x = block(x, Causal()).contiguous()
        rows.append(_rows(x, number))
    return model.logits(model.normalised(Tensor.cat(*rows).unsqueeze(0).contiguous())).squeeze(0)


def query_patterns(model: GPT, tokens: Tensor, number: Tensor) -> Tensor:
    """Attention of the query at place `number`: (n_layers, H, T)."""
    T, H = int(tokens.shape[1]), model.config.n_heads
    places = (Tensor.arange(H) * T + number).cast(dtypes.int32).contiguous()
    x, found = model.embedded(tokens), []
    for block in model.blocks:
        record = Recorder("attn.pattern")
        x = block(x, Causal(), tap=scoped(record))
        found.append(_rows(record["attn.pattern"].contiguous(), places))
    return Tensor.stack(*found)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x (..., d), whose other axes count as one: (n,) -> (n, d)."""
    return embedding(x.reshape(-1, x.shape[-1]), places)
