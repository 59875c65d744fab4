"""Prefill and decode: a model, its cache, and the captured steps that feed it."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_parameters, get_state_dict

from lama.errors import UsageError
from lama.models.adapters import constants_of
from lama.models.protocol import CausalLM
from lama.ops import embedding
from lama.runtime.buffers import from_array, host_array, is_on_host, read, use_large_pages_for
from lama.runtime.replay import CachedStep, code_digest
from lama.shapes import Array
from lama.timing import timed

SMALLEST_BUCKET = 16
LONG = 2048  # tokens of a row from which on large memory pages are worth their making
Result = Literal["last", "every", "none"]  # the tokens of each row that logits are computed for
# In a row of the cache: the context of a model may be 131,072 tokens, which would take gigabytes.
MOST_NUMBERS = 1 << 28


@runtime_checkable
class Step(Protocol):
    """A step from arrays to logits (B, vocab_size), captured or not."""

    def __call__(self, **inputs: Array) -> Array: ...


def bucket(n: int, most: int) -> int:
    """The padded length of n tokens: a power of two up to `most`, so that few lengths are compiled."""
    return min(most, max(SMALLEST_BUCKET, 1 << (n - 1).bit_length()))


def context_of(model: CausalLM, context: int | None = None) -> int:
    """The largest number of tokens of a text: `context`, else the model's or what MOST_NUMBERS allows.

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


def rope_tables(model: CausalLM, length: int) -> dict[str, Tensor]:
    """The tables of rotary positions for texts of this length, which a step reads as it reads weights."""
    ropes = dict.fromkeys(block.attn.rope for block in model.blocks)
    device = str(model.embed.weight.device)
    return {f"rope {rope}": rope.table(length, device) for rope in ropes if rope is not None}


class Runner:
    """A model and its cache: feed tokens, and get the logits after them.

    Each row of the cache has its own tokens, and its numbers do not depend on the other rows. A step is
    compiled once for each bucket of prompt lengths, and once for each of the `sizes` of a batch. Not
    thread-safe.
    """

    def __init__(
        self,
        model: CausalLM,
        batch: int = 1,
        jit: bool = True,
        context: int | None = None,
        sizes: Sequence[int] = (),
    ):
        """`batch`: rows of the cache. `context`: largest number of tokens of a row, see `context_of`.

        Single tokens are fed to the smallest number of rows in `sizes` that suffices, else to all rows. The
        results of the additional rows are dropped. Raises UsageError for a context out of range.
        """
        self.model, self.batch, self.jit, self.sizes = model, batch, jit, sorted(sizes)
        self.positions = np.zeros(batch, np.int32)
        """Number of tokens that each row holds."""
        self._weights = buffers(model)
        self.context = context_of(model, context)
        self.tokens = np.zeros((batch, self.context), np.int32)
        """The tokens that each row holds, followed by arbitrary ones."""
        with timed("the KV cache"):
            self.cache = model.new_cache(batch, self.context)
        self._steps: dict[tuple[Result, int, int], Step] = {}
        self._has_long_rows = False

    def fits(self, model: CausalLM, batch: int, jit: bool, context: int | None = None) -> bool:
        """Whether this runner can be reused; its steps read the weights' buffers, which must not differ."""
        same = self.model is model and self.batch == batch and self.jit == jit
        same = same and self.context == context_of(model, context)
        return same and self._weights == buffers(model)

    def prefill(self, tokens: Array) -> Array:
        """Restart all rows with `tokens` (B, T), T at least 1; returns the last logits (B, vocab_size)."""
        self.positions[:] = 0
        return self.feed(np.arange(self.batch), tokens)

    def decode(self, tokens: Array) -> Array:
        """Feed each row one more token, `tokens` (B,); returns the logits (B, vocab_size) after it."""
        return self.feed(np.arange(self.batch), tokens.reshape(-1, 1))

    def feed(self, rows: Array, tokens: Array, result: Result = "last", counted: int | None = None) -> Array:
        """Feed tokens (n, T) to n different `rows`, (n,), after the tokens that they hold.

        Returns the logits after the last token, (n, vocab_size), or after every token, (n, T, vocab_size);
        for the result "none", a meaningless array. The tokens must fit the context. The rows then hold only
        the first `counted` of them, by default all. T is padded to a bucket, except with `counted`.
        """
        (n, T), starts = tokens.shape, self.positions[rows]
        self.tokens[rows[:, None], starts[:, None] + np.arange(T)] = tokens
        size = bucket(T, self.context) if counted is None and T > 1 else T
        # The padding of a bucket must fit the context: near its end, earlier tokens are fed again. Keys and
        # values of the padding come after all tokens, and are overwritten before a query attends to them. So
        # are those of rows that are fed only to fill a batch.
        wanted = next((b for b in self.sizes if b >= n), self.batch) if T == 1 else n
        is_other = np.ones(self.batch, bool)
        is_other[rows] = False
        others = np.flatnonzero(is_other)[: wanted - n]
        self.positions[others] = np.minimum(self.positions[others], self.context - size)
        fed = np.concatenate([rows, others])
        if len(fed) == self.batch:
            fed = np.arange(self.batch)
        begins = np.minimum(self.positions[fed], self.context - size)
        inputs = {"tokens": self.tokens[fed[:, None], begins[:, None] + np.arange(size)], "positions": begins}
        if len(fed) < self.batch:
            inputs["rows"] = fed
        if result == "last" and size > 1:
            inputs["last"] = self.positions[fed] - begins + T - 1
        step = self._step(result, len(fed), size)
        with timed("prefill and the first token"):
            logits = step(**inputs)
        places = rows if len(fed) == self.batch else np.arange(n)
        self.positions[rows] = starts + (T if counted is None else counted)
        if not self._has_long_rows and self.positions.max() >= LONG:
            self._has_long_rows = True
            use_large_pages_for(*self.cache.keys, *self.cache.values)
        if result == "every":
            logits = logits.reshape(len(fed), size, -1)
            first = starts - begins[places]
            return logits[places[:, None], first[:, None] + np.arange(T)]
        return logits[places]

    def copy(self, source: int, target: int, n: int) -> None:
        """Replace the content of row `target` by the first n tokens of row `source`."""
        for part in self._host_cache():
            part[target, :, :n] = part[source, :, :n]
        self.tokens[target, :n] = self.tokens[source, :n]
        self.positions[target] = n

    def shape_of_prefix(self, n: int) -> tuple[int, ...]:
        """The shape of `prefix(row, n)`."""
        _, heads, _, width = map(int, self.cache.keys[0].shape)
        return 2 * len(self.cache.keys), heads, n, width

    def prefix(self, row: int, n: int) -> Array:
        """A copy of the first n tokens' keys, then values: (2 · n_layers, n_kv_heads, n, d_head)."""
        return np.stack([part[row, :, :n] for part in self._host_cache()])

    def restore(self, row: int, tokens: Array, prefix: Array) -> None:
        """Replace the content of a row by `tokens`, (n,), and what `prefix` returned for them."""
        for part, numbers in zip(self._host_cache(), prefix, strict=True):
            part[row, :, : len(tokens)] = numbers
        self.tokens[row, : len(tokens)] = tokens
        self.positions[row] = len(tokens)

    def digest(self) -> str:
        """A digest of all that the cache's numbers depend on: weights, lama's code, processor, mode."""
        found = hashlib.sha256(repr([code_digest(), self.model.config, self.context]).encode())
        found.update(constants_of(self.model).encode())
        for name, tensor in get_state_dict(self.model).items():
            found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            found.update(read(tensor.contiguous().realize()).data)
        return found.hexdigest()[:32]

    @property
    def copies(self) -> bool:
        """Whether rows can be copied: the cache is in the host's memory."""
        return is_on_host(self.cache.keys[0]) if self.cache.keys else False

    def _host_cache(self) -> Iterator[Array]:
        for tensor in (*self.cache.keys, *self.cache.values):
            array = host_array(tensor)
            assert array is not None, "the cache is not in the host's memory"
            yield array

    def _step(self, result: Result, batch: int, size: int) -> Step:
        """The step of tokens (batch, size), created once."""
        key = result, batch, size
        if key not in self._steps:
            inputs: dict[str, tuple[int, ...]] = {"tokens": (batch, size), "positions": (batch,)}
            if batch < self.batch:
                inputs["rows"] = (batch,)
            if result == "last" and size > 1:
                inputs["last"] = (batch,)
            with timed("building or loading the captured step"):
                self._steps[key] = self._new_step(result, inputs)
        return self._steps[key]

    def _new_step(self, result: Result, inputs: dict[str, tuple[int, ...]]) -> Step:
        def function(*tensors: Tensor) -> Tensor:
            return self._computed(result, **dict(zip(inputs, tensors, strict=True)))

        if self.jit:
            state = get_state_dict(self.model) | get_state_dict([self.cache.keys, self.cache.values], "cache")
            state |= rope_tables(self.model, self.context)
            name = f"{result} {self.model.config} {constants_of(self.model)}"
            return CachedStep(function, inputs, state, name)
        device = str(self.model.embed.weight.device)

        def run(**arrays: Array) -> Array:
            tensors = [from_array(arrays[key].astype(np.int32), dtypes.int32, device) for key in inputs]
            return function(*tensors).numpy()

        return run

    def _computed(
        self,
        result: Result,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """The logits at position `last` of each row, or at every position: (·, vocab_size)."""
        B, T = (int(n) for n in tokens.shape)
        x = self.model.hidden(tokens, self.cache.at(positions, rows)).reshape(B * T, -1)
        if result != "every" and T > 1:  # one place of each row
            places = Tensor.arange(B) * T + (0 if last is None else last)
            x = embedding(x, places.cast(dtypes.int32).contiguous())  # (B, d_model)
        if result == "none":
            return x.cast(dtypes.float32).realize()
        return self.model.logits(x.unsqueeze(1)).squeeze(1).cast(dtypes.float32).realize()
