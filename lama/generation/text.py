"""Generation from text to text: a stream of pieces that is also a string."""

import time
from collections.abc import Callable, Iterator, Sequence

from lama.data.inputs import check_tokens
from lama.errors import UsageError
from lama.generation.decoder import context_of
from lama.generation.engine import Event, Request
from lama.generation.sampling import Sampling
from lama.generation.tokens import check_prompts, generate_events
from lama.models.protocol import CausalLM
from lama.tokenizers import StreamDecoder, Tokenizer


class Generation:
    """One continuation of one prompt: iterate for pieces of text as they are ready, or call `str()`.

    After the last piece `finish_reason` is "stop" (an end token or a stop string), "length" (max_new_tokens)
    or "context" (the context is full).
    """

    def __init__(
        self, prompt_tokens: Sequence[int], events: Iterator[Event], tokenizer: Tokenizer, stop: Sequence[str]
    ):
        self.prompt_tokens = list(prompt_tokens)
        self.tokens: list[int] = []
        """The new tokens so far, without an end token."""
        self.text = ""
        """The new text so far, without the prompt."""
        self.finish_reason: str | None = None
        self.token_times: list[float] = []
        """For each step, seconds since the iteration began."""
        self._pieces = self._run(events, tokenizer, tuple(stop))

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __str__(self) -> str:
        for _ in self:
            pass
        return self.text

    def _run(self, events: Iterator[Event], tokenizer: Tokenizer, stop: tuple[str, ...]) -> Iterator[str]:
        start, stream, reason = time.perf_counter(), TextStream(tokenizer, stop), None
        for event in events:
            self.token_times.append(time.perf_counter() - start)
            reason = event.finish_reason
            if reason == "stop":
                break
            assert event.token is not None
            self.tokens.append(event.token)
            yield from self._emit(stream.push(event.token))
            if stream.stopped:
                self.finish_reason = "stop"
                return
        rest = stream.flush()
        self.finish_reason = "stop" if stream.stopped else reason
        yield from self._emit(rest)

    def _emit(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece


class TextStream:
    """Text from tokens, piece by piece: whole characters, and nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        """Whether a stop string was found; there is no more text then."""
        self._decoder, self._stop, self._pending = StreamDecoder(tokenizer), tuple(stop), ""

    def push(self, token: int) -> str:
        """The new text that can be shown after this token."""
        return self._ready(self._decoder.push(token))

    def flush(self) -> str:
        """The rest of the text, after the last token."""
        return self._ready(self._decoder.flush(), last=True)

    def _ready(self, text: str, last: bool = False) -> str:
        ready, self._pending, self.stopped = split_at_stop(self._pending + text, self._stop, last)
        return ready


def split_at_stop(text: str, stop: tuple[str, ...], last: bool = False) -> tuple[str, str, bool]:
    """(text to show, rest that may begin a stop string, whether a stop string was found).

    `split_at_stop("so it ends.\\n", ("\\n\\n",))` is `("so it ends.", "\\n", False)`. With `last` there is no
    rest.
    """
    found = [i for s in stop if (i := text.find(s)) >= 0]
    if found:
        return text[: min(found)], "", True
    if not last:
        for begin in range(max(0, len(text) - max(map(len, stop), default=1) + 1), len(text)):
            if any(s.startswith(text[begin:]) for s in stop):
                return text[:begin], text[begin:], False
    return text, "", False


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    window: bool = False,
    on_slide: Callable[[int], None] = lambda kept: None,
    context: int | None = None,
    jit: bool = True,
) -> Generation:
    """Continue `prompt`, a text or tokens. Arguments are checked here; the result is computed as it is read.

        print(lama.generate(model, tokenizer, "How can entropy be reversed?", max_new_tokens=50))

    The arguments from `temperature` to `frequency_penalty` are those of `Sampling`; `window` and `on_slide`
    those of `generate_tokens`. `context` is the largest number of tokens that the model attends to: by
    default the model's own, limited to a cache of 2^28 numbers. Text ends at the tokenizer's end of text, at
    the model's `end_tokens`, and before the first of the `stop` strings, one or several. Raises LamaError.
    """
    sampling = Sampling(
        repetition_penalty, temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty
    )
    check_options(max_new_tokens, seed, stop)
    prompt_tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    check_prompts([prompt_tokens], context_of(model, context), window)
    check_tokens(tokenizer, prompt_tokens, model.config.vocab_size)
    end = end_tokens(model, tokenizer)
    request = Request(prompt_tokens, max_new_tokens, sampling, seed, end, window, on_slide)
    events = generate_events(model, request, tokenizer.vocab_size, jit, context)
    return Generation(prompt_tokens, events, tokenizer, stop_strings(stop))


def end_tokens(model: CausalLM, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a text: the model's and the tokenizer's."""
    own = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return {*model.config.end_tokens, *own}


def stop_strings(stop: str | Sequence[str]) -> Sequence[str]:
    """A sequence of stop strings; a single string is one of them, not its letters."""
    return [stop] if isinstance(stop, str) else stop


def check_options(max_new_tokens: int, seed: int, stop: str | Sequence[str]) -> None:
    """Check the options of `generate` that need no model. Raises UsageError."""
    if "" in stop_strings(stop):
        raise UsageError('stop must be a non-empty string; got "". Leave it out to stop at max_new_tokens')
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if seed < 0:
        raise UsageError(f"seed must be 0 or above; got {seed}")
