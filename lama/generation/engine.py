"""Continuous batching: requests join and leave a batch between steps, without changing one another."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from lama.errors import LamaError, UsageError
from lama.generation.decoder import Runner
from lama.generation.sampling import GREEDY, Sampling, next_token
from lama.models.protocol import CausalLM
from lama.shapes import Array


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    max_new_tokens: int = 100
    """Maximum number of new tokens."""
    sampling: Sampling = GREEDY
    seed: int = 0
    """Each request has its own stream of random numbers."""
    end: Collection[int] = ()
    """Tokens that end the text."""
    window: bool = False
    """When the context is full, drop its older half and continue; a longer prompt is cut likewise."""
    on_slide: Callable[[int], None] = field(default=lambda kept: None)
    """Called with the number of tokens that a slide of the window keeps."""
    held: int = 0
    """Tokens of the prompt, fewer than all, that the cache of an engine with one row still holds."""


@dataclass(frozen=True)
class Event:
    """A new token of a request; the last one carries the reason for the end."""

    request: int
    """The number that `submit` returned."""
    token: int
    finish_reason: str | None = None
    """stop (`token` is an end token), length (max_new_tokens) or context (the context is full)."""


@dataclass
class _Row:
    number: int
    request: Request
    tokens: list[int]
    rng: np.random.Generator


class Engine:
    """Up to `rows` requests at a time in one batch of a model; others wait.

    A request gets the same tokens, from the same bits, whatever else the engine does. Each row has its own
    part of the cache, position and random numbers, and its numbers do not depend on other rows. Not
    thread-safe.
    """

    def __init__(
        self,
        model: CausalLM,
        rows: int = 8,
        vocab_size: int | None = None,
        jit: bool = True,
        runner: Runner | None = None,
    ):
        """Only tokens below `vocab_size` (default: all of the model) are drawn."""
        if rows < 1:
            raise UsageError(f"rows must be at least 1; got {rows}")
        self.runner = runner or Runner(model, rows, jit)
        self.context, self.vocab_size = self.runner.context, vocab_size
        self._rows: list[_Row | None] = [None] * rows
        self._waiting: deque[_Row] = deque()
        self._submitted = 0

    @property
    def is_busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting) or any(self._rows)

    def submit(self, request: Request) -> int:
        """Add a request; returns its number. Raises UsageError for a prompt that cannot be continued."""
        check_prompt(request.tokens, self.context, request.window)
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1; got {request.max_new_tokens}")
        self._submitted += 1
        rng = np.random.default_rng(request.seed)
        self._waiting.append(_Row(self._submitted, request, list(request.tokens), rng))
        return self._submitted

    def cancel(self, number: int) -> None:
        """Drop a request that has not ended; its row is free from the next step on."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        self._rows = [None if row is not None and row.number == number else row for row in self._rows]

    def step(self) -> list[Event]:
        """Start the next waiting request if a row is free, else advance each running one by a token.

        Raises LamaError for logits that are not finite; the engine cannot be used any more then.
        """
        if self._waiting and None in self._rows:
            place = self._rows.index(None)
            row = self._rows[place] = self._waiting.popleft()
            return [self._draw(place, row, self._prefill(place, row))]
        running = [(place, row) for place, row in enumerate(self._rows) if row is not None]
        full = [place for place, _ in running if self.runner.positions[place] == self.context]
        logits = {place: self._prefill(place, row) for place, row in running if place in full}
        if len(full) < len(running):
            moving = np.array([row is not None and place not in full for place, row in enumerate(self._rows)])
            last = np.zeros(len(self._rows), np.int32)
            for place, row in running:
                last[place] = row.tokens[-1] if moving[place] else 0
            decoded = self.runner.decode(last, moving)
            logits |= {place: decoded[place] for place, _ in running if place not in full}
        return [self._draw(place, row, logits[place]) for place, row in running]

    def _prefill(self, place: int, row: _Row) -> Array:
        """Feed a row its tokens; of more than a context, those in a window that slides by half a context."""
        kept = max(1, self.context // 2)
        dropped = self.context + 1 - kept  # by each slide, which also makes room for the new token
        first = max(0, -(-(len(row.tokens) - self.context) // dropped) * dropped)
        if first:
            row.request.on_slide(len(row.tokens) - first)
        held = row.request.held if len(row.tokens) == len(row.request.tokens) and not first else 0
        return self.runner.prefill_row(place, np.array(row.tokens[first + held :]), held)

    def _draw(self, place: int, row: _Row, logits: Array) -> Event:
        scores = logits[: self.vocab_size]
        if not np.isfinite(scores).all():
            worst = f"{scores.min()} to {scores.max()} at token {len(row.tokens)}"
            raise LamaError(f"logits must be finite; got {worst}. Try --dtype float32")
        token = next_token(scores, row.tokens, row.request.sampling, row.rng)
        row.tokens.append(token)
        reason = self._reason(place, row, token)
        if reason is not None:
            self._rows[place] = None
        return Event(row.number, token, reason)

    def _reason(self, place: int, row: _Row, token: int) -> str | None:
        request = row.request
        if token in request.end:
            return "stop"
        if len(row.tokens) - len(request.tokens) == request.max_new_tokens:
            return "length"
        return "context" if self.runner.positions[place] == self.context and not request.window else None


WINDOW = "set window=True"  # the advice in an error; the command line says --window in its place


def check_prompt(tokens: Sequence[int], context: int, window: bool) -> None:
    """Raises UsageError for a prompt that cannot be continued."""
    if not tokens:
        raise UsageError("prompt must hold at least one token; got an empty prompt. Give some text")
    if len(tokens) > context and not window:
        rule = f"have at most {context} tokens, the context"
        raise UsageError(f"prompt must {rule}; got {len(tokens)}. Shorten it or {WINDOW}")
