"""The answers to a request's prompts as pieces of text, for completions and chat alike."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex

from lama import __version__
from lama.generation.engine import Constraint, Event, TokenLogprob
from lama.generation.engine import Request as EngineRequest
from lama.generation.text import TextStream
from lama.server.errors import Refused
from lama.server.fields import LONGEST_TEXT
from lama.server.schema import Options
from lama.server.service import Backend

LONGEST_TOKEN = 128  # characters

Answer = dict[str, object] | AsyncGenerator[Mapping[str, object], None]
"""The JSON object of an answer, or those of a stream of events."""


@dataclass
class Piece:
    """A part of an answer."""

    index: int
    """The prompt's number times `n`, plus the answer's number among those to this prompt."""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    """The tokens of the text, and an end token, which has no text: lm-evaluation-harness needs it."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """For each token, if asked for."""
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    """On an answer's first piece, if asked for."""
    finish_reason: str | None = None
    """OpenAI's, on the last piece: stop or length."""
    context_full: bool = False
    """Whether the text ended because the context was full."""


@dataclass
class Usage:
    """Numbers of tokens of a whole request."""

    prompt_tokens: int = 0
    """Each prompt once, however many answers it has."""
    completion_tokens: int = 0
    """End tokens too."""
    cached_tokens: int = 0
    """Tokens of the prompts that the cache already held."""

    def to_json(self) -> dict[str, object]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice:
    """One answer in progress: it turns events into pieces. Tokens wait until their text can be shown."""

    def __init__(self, backend: Backend, index: int, stop: Sequence[str]):
        self._stream, self._index = TextStream(backend.tokenizer, stop), index
        self._next = Piece(index)
        self.stopped = False
        """Whether a stop string was found."""

    def take(self, event: Event) -> Piece | None:
        """The piece that this event completes, if any. Raises Refused for the event of an error."""
        if event.error is not None:
            raise Refused(500, event.error, type="server_error")
        piece, reason = self._next, event.finish_reason
        if event.prompt_logprobs is not None:
            piece.prompt_logprobs = event.prompt_logprobs
        if event.token is not None:
            piece.tokens.append(event.token)
            if event.logprob is not None:
                piece.logprobs.append(event.logprob)
            if reason != "stop":
                piece.text += self._stream.push(event.token)
        if reason is not None and not self._stream.stopped:
            piece.text += self._stream.flush()
        self.stopped = self._stream.stopped
        if self.stopped or reason == "stop":
            piece.finish_reason = "stop"
        elif reason is not None:
            piece.finish_reason, piece.context_full = "length", reason == "context"
        if not (piece.text or piece.finish_reason or piece.prompt_logprobs):
            return None
        self._next = Piece(self._index)
        return piece


async def answers(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    options: Options,
    usage: Usage,
    *,
    prompt_logprobs: int | None = None,
    constraint: Callable[[], Constraint | None] | None = None,
) -> AsyncGenerator[Piece, None]:
    """The pieces of all answers, as they come; counts tokens in `usage`.

    Answer i to a prompt has the seed `options.seed + i`. `constraint` is called once for each answer. Close
    the iterator to cancel the rest. Raises QueueFull, Draining and Refused.
    """
    end = frozenset[int]() if options.ignore_eos and constraint is None else backend.end
    usage.prompt_tokens += sum(map(len, prompts))
    requests = [
        EngineRequest(
            prompt,
            options.max_tokens,
            options.sampling,
            options.seed + i,
            end,
            logprobs=options.logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=options.logit_bias,
            constraint=constraint and constraint(),
            engine=backend.engine,
        )
        for prompt in prompts
        for i in range(options.n)
    ]
    choices = [Choice(backend, index, options.stop) for index in range(len(requests))]
    with backend.worker.answering(requests) as found:
        async for index, event in found:
            usage.completion_tokens += event.token is not None
            if index % options.n == 0:
                usage.cached_tokens += event.cached_tokens
            piece = choices[index].take(event)
            if choices[index].stopped and event.finish_reason is None:
                found.end(index)
            if piece is not None:
                yield piece


def heading(backend: Backend, prefix: str) -> dict[str, object]:
    """The fields that all objects of one answer begin with."""
    return {
        "id": f"{prefix}-{token_hex(12)}",
        "created": int(time.time()),
        "model": backend.name,
        "system_fingerprint": f"lama-{__version__}",
    }


def check_length(backend: Backend, n: int, param: str) -> None:
    """Raise Refused for more characters than the context can hold, before they are encoded."""
    if n > max(LONGEST_TEXT, LONGEST_TOKEN * backend.context):
        raise _too_long(backend, f"{n:,} characters", param)


def fits(backend: Backend, tokens: Sequence[int], param: str) -> None:
    """Raise Refused for a prompt that is empty or longer than the context."""
    if not tokens:
        raise Refused(400, f"{param} must have at least one token; got none. Give some text", param=param)
    if len(tokens) > backend.context:
        raise _too_long(backend, f"{len(tokens)} tokens", param)


def _too_long(backend: Backend, got: str, param: str) -> Refused:
    rule = f"this model's maximum context length is {backend.context} tokens here"
    message = f"{rule}; got {got} in {param}. Shorten it"
    return Refused(400, message, param=param, code="context_length_exceeded")
