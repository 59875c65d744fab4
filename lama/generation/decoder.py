"""Prefill and decode: a model, its cache, and the steps that TinyJit captures."""

from collections.abc import Callable

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_parameters, get_state_dict

from lama.kernels.plan import Step
from lama.models.gpt import GPT

SMALLEST_BUCKET = 16


def bucket(n: int, most: int) -> int:
    """The length that n tokens are padded to: a power of two, so that few lengths are ever compiled."""
    return min(most, max(SMALLEST_BUCKET, 1 << (n - 1).bit_length()))


def buffers(model: GPT) -> list[UOp]:
    """The buffers that the model's weights lie in; others once a parameter is replaced."""
    return [parameter.uop for parameter in get_parameters(model)]


class Decoder:
    """Feeds tokens to a model and returns the logits of the last one.

    All rows of the batch stand at the same `position`. Nothing is compiled for a new prompt length but once for each
    bucket (a power of two), and nothing for a new token. Not for two threads at once.
    """

    def __init__(self, model: GPT, batch: int = 1, jit: bool = True):
        self.model, self.batch, self.jit, self.position = model, batch, jit, 0
        self._weights = buffers(model)
        self.cache = model.new_cache(batch)
        self._steps: dict[tuple[str, int], Callable[[np.ndarray, UOp], np.ndarray]] = {}

    def fits(self, model: GPT, batch: int, jit: bool) -> bool:
        """Whether this is a decoder for that: for these very weights too, since what was captured reads their buffers."""
        return self.model is model and (self.batch, self.jit) == (batch, jit) and self._weights == buffers(model)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Start again with `tokens` (B, T), T at least 1; logits (B, vocab_size) after the last of them."""
        n = tokens.shape[1]
        size = bucket(n, self.model.config.context_length)
        # The padding's keys and values land behind the prompt, where later tokens overwrite them before any are seen.
        padded = np.zeros((self.batch, size), np.int32)
        padded[:, :n] = tokens
        logits = self._step("prefill", size)(padded, self._variable("last", n - 1))
        self.position = n
        return logits

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """One more token for each row, `tokens` (B,); logits (B, vocab_size) after it."""
        logits = self._step("decode", 1)(tokens.reshape(-1, 1), self._variable("position", self.position))
        self.position += 1
        return logits

    def _variable(self, name: str, value: int) -> UOp:
        return UOp.variable(name, 0, self.model.config.context_length - 1).bind(value)

    def _step(self, name: str, size: int) -> Callable[[np.ndarray, UOp], np.ndarray]:
        """The prefill or decode step of tokens (B, size), made once."""
        if (name, size) not in self._steps:
            function: Callable[[Tensor, UOp], Tensor] = self._prefill_step if name == "prefill" else self._decode_step
            if self.jit:
                state = get_state_dict(self.model) | get_state_dict(self.cache, "cache")
                self._steps[name, size] = Step(function, (self.batch, size), state, f"{name} {self.model.config}")
            else:
                self._steps[name, size] = lambda tokens, variable: function(self._tensor(tokens), variable).numpy()
        return self._steps[name, size]

    def _tensor(self, tokens: np.ndarray) -> Tensor:
        return Tensor(tokens.astype(np.int32), device=str(self.model.embed.weight.device)).realize()

    def _prefill_step(self, tokens: Tensor, last: UOp) -> Tensor:
        x = self.model.hidden(tokens, self.cache)[:, last : last + 1]  # (B, 1, d_model): only one row is unembedded
        return self.model.logits(x.contiguous()).squeeze(1).cast(dtypes.float32).realize()

    def _decode_step(self, tokens: Tensor, position: UOp) -> Tensor:
        return self.model.logits(self.model.hidden(tokens, self.cache, position)).squeeze(1).cast(dtypes.float32).realize()
