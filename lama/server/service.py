"""State that all endpoints share: the models with their worker, the limits, and the lines logged so far."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lama.errors import note, quoted
from lama.generation.text import end_tokens
from lama.models.gpt import GPT
from lama.server.errors import Refused
from lama.server.worker import Worker
from lama.tokenizers import Tokenizer
from lama.tokenizers.chat_template import ChatTemplate

MOST_NOTES = 100  # names of fields and models that are logged


@dataclass(frozen=True)
class Limits:
    """Largest sizes of a request."""

    max_tokens: int | None = None
    """New tokens of an answer; None for as many as the context holds."""
    max_n: int = 128
    """Answers to one request: its prompts times `n`."""
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    timeout: float = 600.0
    """Seconds from a request's first byte to the last one of its answer."""
    max_active: int = 256
    """Requests at the same time, including those whose bodies are incomplete."""


@dataclass(frozen=True)
class Backend:
    """A loaded model and the thread that runs it."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    worker: Worker
    template: ChatTemplate | None = None
    """None for a model without a chat template."""
    engine: int = 0
    """The worker's engine that runs the model: each adapter has one."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Most tokens of a prompt with its answer."""
        return self.worker.engine.context

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens that the model can generate."""
        return min(self.tokenizer.vocab_size, self.model.config.vocab_size)

    @cached_property
    def sampling(self) -> Mapping[str, float]:
        """The values of `Sampling` for a request that names none: the model's own, else OpenAI's."""
        return {"temperature": 1.0, **self.model.sampling}

    @cached_property
    def end(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(end_tokens(self.model, self.tokenizer))

    @cached_property
    def _pieces(self) -> dict[int, tuple[str, list[int]]]:
        return {}

    def piece(self, token: int) -> tuple[str, list[int]]:
        """The text of one token and its bytes; a part of a character is written `bytes:\\xe2\\x80`."""
        if token not in self._pieces:
            raw = self.tokenizer.decode_bytes([token]) if token < self.tokenizer.vocab_size else b""
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._pieces[token] = text, list(raw)
        return self._pieces[token]


class Service:
    """The state of a server; without a model until `backend` is set."""

    def __init__(self, limits: Limits | None = None, internals: bool = True):
        """`internals`: whether requests for activations, the logit lens and attention are allowed."""
        self.limits, self.internals = limits or Limits(), internals
        self.draining = False
        self.n_active = 0
        """Requests over HTTP whose answers have not ended."""
        self.statuses: Counter[int] = Counter()
        """Number of answers by status."""
        self._backend: Backend | None = None
        self.adapted: list[Backend] = []
        """Further models, which a request chooses by name: with each adapter, and perhaps without."""
        self._noted: set[str] = set()

    @property
    def backend(self) -> Backend:
        """The loaded model. Raises Refused while it is loading."""
        if self._backend is None:
            raise Refused(503, "the model is loading; try again", type="unavailable_error", code="loading")
        return self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = backend

    def backend_for(self, body: Mapping[str, object]) -> Backend:
        """The model that a request names, by `MODEL:ADAPTER` or ADAPTER; without such a name, `backend`.

        Raises Refused while it is loading.
        """
        return self._named(body.get("model")) or self.backend

    def _named(self, asked: object) -> Backend | None:
        """The model of this name; None for another name."""
        every = [self.backend, *self.adapted]
        found = [each for each in every if asked == each.name]
        found += [each for each in every if asked == each.name.rpartition(":")[2]]
        return found[0] if found else None

    @property
    def is_loaded(self) -> bool:
        """Whether there is a model."""
        return self._backend is not None

    def drain(self) -> None:
        """Accept no more requests; those that wait or run are still answered."""
        self.draining = True
        if self._backend is not None:
            self._backend.worker.drain()

    def note_once(self, message: str) -> None:
        """Log a line, unless it was logged before or there were many."""
        if message not in self._noted and len(self._noted) < MOST_NOTES:
            self._noted.add(message)
            note(message)

    def note_unused(self, body: Mapping[str, object], known: Iterable[str]) -> None:
        """Log the fields of a request that this server does not know, and another model's name."""
        for name in body.keys() - set(known):
            self.note_once(f"ignored the unknown field {quoted(name, 60)} of a request")
        asked = body.get("model")
        if isinstance(asked, str) and self._named(asked) is None:
            self.note_once(f"a request names the model {quoted(asked, 60)}; {self.backend.name} answers")
