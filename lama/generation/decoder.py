"""Prefill and decode: a model, its cache, and the captured steps that feed it."""

from typing import Protocol, runtime_checkable

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_parameters, get_state_dict

from lama.errors import UsageError
from lama.models.protocol import CausalLM
from lama.ops import embedding
from lama.runtime.buffers import from_array
from lama.runtime.replay import CachedStep
from lama.shapes import Array

SMALLEST_BUCKET = 16
MOST_NUMBERS = (
    1 << 28
)  # in a row of the cache: a model may look at 131,072 tokens, which would take gigabytes


@runtime_checkable
class Step(Protocol):
    """A step from arrays to logits (B, vocab_size), captured or not."""

    def __call__(self, **inputs: Array) -> Array: ...


@runtime_checkable
class StepFunction(Protocol):
    """The computation of a step on its input tensors."""

    def __call__(self, *inputs: Tensor) -> Tensor: ...


def bucket(n: int, most: int) -> int:
    """The padded length of n tokens: a power of two up to `most`, so that few lengths are compiled."""
    return min(most, max(SMALLEST_BUCKET, 1 << (n - 1).bit_length()))


def context_of(model: CausalLM, context: int | None = None) -> int:
    """Most tokens of a text that is generated: `context`, else the model's, or what MOST_NUMBERS allows.

    Raises UsageError for a `context` above the model's context_length, or below 1.
    """
    c = model.config
    if context is not None:
        if not 1 <= context <= c.context_length:
            rule = f"be from 1 to {c.context_length}, the model's context_length"
            raise UsageError(f"context must {rule}; got {context}")
        return context
    return min(c.context_length, max(1, MOST_NUMBERS // max(1, 2 * c.n_layers * c.n_kv_heads * c.d_head)))


def buffers(model: CausalLM) -> list[UOp]:
    """The buffers of the model's weights, which change when a parameter is replaced."""
    return [parameter.uop for parameter in get_parameters(model)]


class Runner:
    """A model and its cache: takes tokens, returns the logits after the last one of each row.

    Each row has its own position, and its numbers do not depend on the other rows. A step is compiled once
    for each bucket of prompt lengths and once for decoding. Not thread-safe.
    """

    def __init__(self, model: CausalLM, batch: int = 1, jit: bool = True, context: int | None = None):
        """`context`: most tokens of a row, by default those of `context_of`, which raises UsageError."""
        self.model, self.batch, self.jit = model, batch, jit
        self.positions = np.zeros(batch, np.int32)
        """Number of tokens that each row has been fed."""
        self._weights = buffers(model)
        self.context = context_of(model, context)
        self.cache = model.new_cache(batch, self.context)
        self._steps: dict[tuple[str, int, int], Step] = {}

    def fits(self, model: CausalLM, batch: int, jit: bool, context: int | None = None) -> bool:
        """Whether this runner can be used: for the same weights too, whose buffers captured steps read."""
        same = self.model is model and self.batch == batch and self.jit == jit
        same = same and self.context == context_of(model, context)
        return same and self._weights == buffers(model)

    def prefill(self, tokens: Array) -> Array:
        """Restart all rows with `tokens` (B, T), T at least 1; returns the last logits (B, vocab_size)."""
        return self._feed(tokens, np.arange(self.batch), 0)

    def prefill_row(self, row: int, tokens: Array, start: int = 0) -> Array:
        """Feed one row `tokens` (T,), T at least 1, behind its first `start`; returns the last logits."""
        return self._feed(tokens.reshape(1, -1), np.array([row]), start)[0]

    def _feed(self, tokens: Array, rows: Array, start: int) -> Array:
        self.positions[rows] = start
        n = tokens.shape[1]
        size = bucket(n, self.context - start)
        # Keys and values of the padding lie behind the prompt: later tokens overwrite them before a query
        # sees them.
        padded = np.zeros((len(rows), size), np.int32)
        padded[:, :n] = tokens
        last = np.full(len(rows), n - 1)
        step = self._step("prefill", len(rows), size)
        logits = step(tokens=padded, positions=self.positions[rows], rows=rows, last=last)
        self.positions[rows] = start + n
        return logits

    def decode(self, tokens: Array, rows: Array | None = None) -> Array:
        """Feed each row one more token, `tokens` (B,); returns the logits (B, vocab_size) after it.

        Only rows in the mask `rows` (B,) advance; the results of the others are to be ignored.
        """
        # A row that does not advance writes its key and value behind its tokens, where no query sees them.
        logits = self._step("decode", self.batch, 1)(tokens=tokens.reshape(-1, 1), positions=self.positions)
        self.positions += 1 if rows is None else rows.astype(np.int32)
        return logits

    def _step(self, name: str, batch: int, size: int) -> Step:
        """The prefill or decode step of tokens (batch, size), created once."""
        if (name, batch, size) not in self._steps:
            inputs: dict[str, tuple[int, ...]] = {"tokens": (batch, size), "positions": (batch,)}
            if name == "prefill":
                inputs |= {"rows": (batch,), "last": (batch,)}
            function = self._prefill_step if name == "prefill" else self._decode_step
            self._steps[name, batch, size] = self._new_step(name, function, inputs)
        return self._steps[name, batch, size]

    def _new_step(self, name: str, function: StepFunction, inputs: dict[str, tuple[int, ...]]) -> Step:
        if self.jit:
            state = get_state_dict(self.model) | get_state_dict([self.cache.keys, self.cache.values], "cache")
            return CachedStep(function, inputs, state, f"{name} {self.model.config}")
        device = str(self.model.embed.weight.device)

        def run(**arrays: Array) -> Array:
            tensors = [from_array(arrays[key].astype(np.int32), dtypes.int32, device) for key in inputs]
            return function(*tensors).numpy()

        return run

    def _prefill_step(self, *inputs: Tensor) -> Tensor:
        tokens, positions, rows, last = inputs
        B, T = (int(n) for n in tokens.shape)
        x = self.model.hidden(tokens, self.cache.at(positions, rows if self.batch > B else None))
        places = (Tensor.arange(B) * T + last).cast(dtypes.int32).contiguous()
        x = embedding(x.reshape(B * T, -1), places)  # (B, d_model): one place of each row is unembedded
        return self.model.logits(x.unsqueeze(1)).squeeze(1).cast(dtypes.float32).realize()

    def _decode_step(self, *inputs: Tensor) -> Tensor:
        tokens, positions = inputs
        x = self.model.hidden(tokens, self.cache.at(positions))
        return self.model.logits(x).squeeze(1).cast(dtypes.float32).realize()
