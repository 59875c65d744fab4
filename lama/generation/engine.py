"""Continuous batching: requests join and leave a batch between steps, without changing one another."""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from lama.errors import LamaError, UsageError, first_line
from lama.generation.decoder import SMALLEST_BUCKET, Result, Runner
from lama.generation.drafts import draft
from lama.generation.prefix_store import PrefixStore, common
from lama.generation.sampling import GREEDY, Sampling, next_token
from lama.models.protocol import CausalLM
from lama.shapes import Array

SCORED = 64  # prompt tokens whose logits are computed at a time
ALONE = 4  # chunks of a prompt at once, while no running request waits for its next token
LEAST_SHARED = 16  # tokens; a shorter prefix is computed again rather than copied


@runtime_checkable
class Constraint(Protocol):
    """The tokens that may come next, such as those of valid JSON."""

    def allowed(self) -> Array:
        """(vocab_size,) bool; if none is True, the text ends."""

    def accept(self, token: int) -> None:
        """Move to the state after `token`."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    max_new_tokens: int = 100
    """Maximum number of new tokens; 0 with `prompt_logprobs` only."""
    sampling: Sampling = GREEDY
    seed: int = 0
    """Each request has its own stream of random numbers."""
    end: Collection[int] = ()
    """Tokens that end the text."""
    window: bool = False
    """When the context is full, drop its older half and continue; a longer prompt is cut likewise."""
    on_slide: Callable[[int], None] = field(default=lambda kept: None)
    """Called with the number of tokens that a slide of the window keeps."""
    logprobs: int | None = None
    """Report each new token's log-probability, and those of this many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt. It is then computed whole, whatever the cache holds."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Numbers to add to the logits of some tokens."""
    constraint: Constraint | None = None
    engine: int = 0
    """The number of the engine that answers, if there are several."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (natural) by the model itself, before temperature, penalties and filters."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    """The most likely tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class Event:
    """A new token of a request; the last one carries the reason for the end."""

    request: int
    """The number that `submit` returned."""
    token: int | None
    """None where no token comes with the event: after an error, and for max_new_tokens 0."""
    finish_reason: str | None = None
    """stop (`token` is an end token), length (max_new_tokens), context (the context is full) or error."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    """On the first event of a request that asks for them; None for the first token."""
    cached_tokens: int = 0
    """On the first event: tokens of the prompt that the cache already held."""
    error: str | None = None


@dataclass(frozen=True)
class SlotState:
    """A row of the cache."""

    row: int
    request: int | None
    """The number of the request that runs there."""
    n_tokens: int
    """Number of tokens that the row holds."""


@dataclass
class _Row:
    number: int
    request: Request
    tokens: list[int]
    rng: np.random.Generator
    first: int = 0
    """The first token that is in the window."""
    cached: int = 0
    is_new: bool = True
    prompt_logprobs: list[TokenLogprob | None] | None = None


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
        *,
        runner: Runner | None = None,
        context: int | None = None,
        spare: int = 0,
        chunk: int = 0,
        reuse: bool = False,
        drafts: int = 0,
        store: PrefixStore | None = None,
    ):
        """Only tokens below `vocab_size` (default: all of the model) are sampled.

        With `reuse`, the longest prefix that any row of the cache holds is not computed again; `spare`
        additional rows keep those of finished requests. At most `chunk` prompt tokens are computed between
        two steps of running requests; 0 means whole prompts. While one request runs, up to `drafts` tokens
        are copied from an earlier repetition in its text and verified in one step. A `store` keeps prefixes
        on disk, and receives those that rows lose.
        """
        if rows < 1:
            raise UsageError(f"rows must be at least 1; got {rows}")
        self.runner = runner or Runner(model, rows + spare, jit, context)
        self.context, self.vocab_size = self.runner.context, vocab_size
        self.rows, self.chunk, self.drafts, self.store = rows, chunk, drafts, store
        self.reuse = reuse
        if not reuse:
            self.runner.positions[:] = 0
        self._running: dict[int, _Row] = {}  # by the row of the cache, oldest first
        self._waiting: deque[_Row] = deque()
        self._used = [0] * self.runner.batch  # when each row of the cache was last freed
        self._submitted = 0
        self._prompts_next = True

    @property
    def is_busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def n_running(self) -> int:
        """Number of requests that have a row."""
        return len(self._running)

    def slots(self) -> list[SlotState]:
        """The state of every row of the cache."""
        numbers = {place: row.number for place, row in self._running.items()}
        held = enumerate(self.runner.positions.tolist())
        return [SlotState(place, numbers.get(place), n) for place, n in held]

    def warm_up(self) -> None:
        """Compile the steps of all sizes of a batch, and of prompts up to a chunk."""
        runner, row = self.runner, np.array([0])

        def feed(rows: Array, n: int, result: Result = "last", counted: int | None = None) -> None:
            if n <= self.context:
                runner.feed(rows, np.zeros((len(rows), n), np.int32), result, counted)
            runner.positions[:] = 0

        for n in runner.sizes:
            feed(np.arange(n), 1)
        n = SMALLEST_BUCKET
        while n <= ALONE * self.chunk:
            feed(row, n)
            n *= 2
        for n in (self.chunk, ALONE * self.chunk):
            feed(row, n or SMALLEST_BUCKET, "none")
        if self.drafts:
            feed(row, 1 + self.drafts, "every", 1)

    def forget(self) -> None:
        """Treat every row as empty: the content of the cache is unknown."""
        self.runner.positions[:] = 0

    def submit(self, request: Request) -> int:
        """Add a request; returns its number. Raises UsageError for a prompt that cannot be continued."""
        check_prompt(request.tokens, self.context, request.window)
        least = 0 if request.prompt_logprobs is not None else 1
        if request.max_new_tokens < least:
            raise UsageError(f"max_new_tokens must be at least {least}; got {request.max_new_tokens}")
        self._submitted += 1
        rng = np.random.default_rng(request.seed)
        self._waiting.append(_Row(self._submitted, request, list(request.tokens), rng))
        return self._submitted

    def cancel(self, number: int) -> None:
        """Drop a request that has not ended; its row is free from the next step on."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        for place in [place for place, row in self._running.items() if row.number == number]:
            self._free(place)

    def step(self) -> list[Event]:
        """Compute a part of the oldest prompts, or advance each running request; returns their events.

        A request whose logits are not finite ends with the reason error; the others are not affected.
        """
        while self._waiting and len(self._running) < self.rows:
            self._start(self._waiting.popleft())
        pending = {place: self._pending(place, row) for place, row in self._running.items()}
        prompts = [place for place, n in pending.items() if n > 1]
        decoding = [place for place, n in pending.items() if n == 1]
        if prompts and (self._prompts_next or not self.chunk or not decoding):
            self._prompts_next = False
            if not decoding:
                return self._prefill(prompts[0], pending[prompts[0]], ALONE * self.chunk)
            events, left = [], self.chunk
            for place in prompts:
                events += self._prefill(place, pending[place], left)
                left -= pending[place]
                if left < self.chunk / 2:
                    break
            return events
        self._prompts_next = True
        return self._decode(decoding) if decoding else []

    def _start(self, row: _Row) -> None:
        """Give a request a row of the cache, with the longest beginning of its text that is held anywhere."""
        runner, wanted = self.runner, np.array(row.tokens, np.int32)
        free = [place for place in range(runner.batch) if place not in self._running]
        place = oldest = min(free, key=lambda i: self._used[i])
        if self.reuse and row.request.prompt_logprobs is None and len(wanted) <= self.context:
            shared = [self._shared(i, wanted) for i in range(runner.batch)]
            # Of rows that share as much, prefer a free one that holds little else.
            best = max(range(runner.batch), key=lambda i: (shared[i], i in free, -runner.positions[i]))
            if best in free and (best == oldest or 2 * shared[best] >= runner.positions[best]):
                place, row.cached = best, shared[best]
            self._keep(place, row.cached)
            if place != best and shared[best] >= LEAST_SHARED and runner.copies:
                runner.copy(best, place, shared[best])
                row.cached = shared[best]
            row.cached = self._loaded(place, wanted, row.cached)
        else:
            self._keep(place, 0)
        runner.positions[place] = row.cached
        self._running[place] = row
        if row.request.prompt_logprobs is not None:
            row.prompt_logprobs = [None]

    def _keep(self, place: int, n: int, wait: bool = False) -> None:
        """Give a row's tokens to the store, if more than LEAST_SHARED after the first n would be lost."""
        held = int(self.runner.positions[place])
        tokens = self.runner.tokens[place, :held]
        if self.store is not None and held > n + LEAST_SHARED and self.store.lacks(tokens):
            self.store.keep(tokens, self.runner.prefix(place, held), wait)

    def _loaded(self, place: int, wanted: Array, held: int) -> int:
        """The number of tokens that a row holds after the store has been asked for more than `held`."""
        if self.store is None:
            return held
        n, entry = self.store.longest(wanted)
        if entry is None or n < held + LEAST_SHARED or (prefix := self.store.load(entry, n)) is None:
            return held
        self.runner.restore(place, wanted[:n], prefix)
        return n

    def close(self) -> None:
        """Give the tokens of all rows to the store, and wait until they are written."""
        if self.store is not None:
            for place in range(self.runner.batch):
                self._keep(place, 0, wait=True)
            self.store.close()

    def _free(self, place: int) -> None:
        del self._running[place]
        self._used[place] = max(self._used) + 1

    def _shared(self, place: int, wanted: Array) -> int:
        """The number of first tokens, fewer than all, that a row of the cache has in common with a text."""
        return common(self.runner.tokens[place, : self.runner.positions[place]], wanted[:-1])

    def _pending(self, place: int, row: _Row) -> int:
        """The number of tokens that a row still has to be fed, after a slide where the context is full."""
        if row.first == 0 < self._first(row) or self.runner.positions[place] == self.context:
            row.first = self._first(row)
            self.runner.positions[place] = 0
            row.request.on_slide(len(row.tokens) - row.first)
        return len(row.tokens) - row.first - int(self.runner.positions[place])

    def _first(self, row: _Row) -> int:
        """The first token in the window, which slides by half a context."""
        dropped = self.context + 1 - max(1, self.context // 2)  # by each slide: makes room for a new token
        return max(0, -(-(len(row.tokens) - self.context) // dropped) * dropped)

    def _prefill(self, place: int, pending: int, most: int) -> list[Event]:
        """Feed a prompt up to `most` tokens, 0 for all that are pending; its first event at its end."""
        row = self._running[place]
        wants_all = row.prompt_logprobs is not None
        n = min(pending, most or pending, SCORED if wants_all else pending)
        begin, ends = row.first + int(self.runner.positions[place]), n == pending
        result: Result = "every" if wants_all else "last" if ends else "none"
        tokens = np.array([row.tokens[begin : begin + n]], np.int32)
        logits = self.runner.feed(np.array([place]), tokens, result)[0]
        if wants_all:
            self._score_prompt(row, begin, logits)
        return [self._draw(place, row, logits[-1] if wants_all else logits)] if ends else []

    def _decode(self, places: list[int]) -> list[Event]:
        """Feed each of these rows its last token; one alone, drafts of the next ones too."""
        rows = [self._running[place] for place in places]
        room = self.context - int(self.runner.positions[places].max()) - 1
        # With more rows, a longer step costs more than it gains.
        alone = len(rows) == 1 and room >= self.drafts
        if alone and (guesses := draft(rows[0].tokens, self.drafts)):
            return self._verify(places[0], rows[0], guesses)
        logits = self.runner.feed(np.array(places), np.array([[row.tokens[-1]] for row in rows]))
        return [self._draw(*each) for each in zip(places, rows, logits, strict=True)]

    def _verify(self, place: int, row: _Row, guesses: list[int]) -> list[Event]:
        """Feed a row its last token and guesses; the new tokens are the right guesses and one more."""
        fed = np.zeros((1, 1 + self.drafts), np.int32)
        fed[0, : 1 + len(guesses)] = row.tokens[-1], *guesses
        logits = self.runner.feed(np.array([place]), fed, "every", counted=1)[0]
        events: list[Event] = []
        for scores, guess in zip(logits, [*guesses, None], strict=False):
            events.append(self._draw(place, row, scores))
            if events[-1].finish_reason is not None or events[-1].token != guess:
                break
            self.runner.positions[place] += 1  # the guess was right, and its key and value are there
        return events

    def _draw(self, place: int, row: _Row, logits: Array) -> Event:
        """The next token of a row, or the error that ends it."""
        try:
            event = self._next(place, row, logits[: self.vocab_size])
        except Exception as error:  # of its constraint: the other requests continue
            known = isinstance(error, LamaError)
            what = str(error) if known else f"unexpected {type(error).__name__}: {first_line(error)}"
            event = Event(row.number, None, "error", error=what)
        if event.finish_reason is not None:
            self._free(place)
        if row.is_new:
            row.is_new = False
            event = replace(event, prompt_logprobs=row.prompt_logprobs, cached_tokens=row.cached)
        return event

    def _next(self, place: int, row: _Row, logits: Array) -> Event:
        request = row.request
        if not np.isfinite(logits).all():
            worst = f"{logits.min()} to {logits.max()} at token {len(row.tokens)}"
            raise LamaError(f"logits must be finite; got {worst}. Try --dtype float32")
        if request.max_new_tokens == 0:
            return Event(row.number, None, "length")
        scores = biased(logits, request)
        if request.constraint is not None and scores.max() == -np.inf:
            return Event(row.number, None, "stop")
        token = next_token(scores, row.tokens, request.sampling, row.rng, len(request.tokens))
        if request.constraint is not None and token not in request.end:
            request.constraint.accept(token)
        row.tokens.append(token)
        logprob = None if request.logprobs is None else token_logprob(logits, token, request.logprobs)
        return Event(row.number, token, self._reason(place, row, token), logprob)

    def _reason(self, place: int, row: _Row, token: int) -> str | None:
        request = row.request
        if token in request.end:
            return "stop"
        if len(row.tokens) - len(request.tokens) == request.max_new_tokens:
            return "length"
        return "context" if self.runner.positions[place] == self.context and not request.window else None

    def _score_prompt(self, row: _Row, begin: int, logits: Array) -> None:
        """Add the log-probabilities of the prompt's tokens after those from `begin` on, (T, vocab_size)."""
        assert row.prompt_logprobs is not None and row.request.prompt_logprobs is not None
        following = row.tokens[begin + 1 : begin + 1 + len(logits)]
        for scores, token in zip(logits[:, : self.vocab_size], following, strict=False):
            row.prompt_logprobs.append(token_logprob(scores, token, row.request.prompt_logprobs))


def biased(logits: Array, request: Request) -> Array:
    """The logits with a request's bias; those of tokens that its constraint forbids are -inf."""
    if request.logit_bias:
        logits = logits.copy()
        logits[list(request.logit_bias)] += np.array([*request.logit_bias.values()], logits.dtype)
    if request.constraint is not None:
        logits = np.where(request.constraint.allowed()[: len(logits)], logits, -np.inf)
    return logits


def token_logprob(logits: Array, token: int, n: int) -> TokenLogprob:
    """The log-probability of `token` by `logits` (vocab_size,), and the n most likely tokens."""
    best = float(logits.max())
    total = best + float(np.log(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    n = min(n, len(logits))
    top: list[tuple[int, float]] = []
    if n:
        least = np.partition(logits, len(logits) - n)[len(logits) - n]
        some = np.flatnonzero(logits >= least)
        top = [(int(i), float(logits[i]) - total) for i in some[np.argsort(-logits[some], kind="stable")][:n]]
    return TokenLogprob(token, float(logits[token]) - total, top)


WINDOW = "set window=True"  # the advice in an error; the command line says --window in its place


def check_prompt(tokens: Sequence[int], context: int, window: bool) -> None:
    """Raise UsageError for a prompt that cannot be continued."""
    if not tokens:
        raise UsageError("prompt must hold at least one token; got an empty prompt. Give some text")
    if len(tokens) > context and not window:
        rule = f"have at most {context} tokens, the context"
        raise UsageError(f"prompt must {rule}; got {len(tokens)}. Shorten it or {WINDOW}")
