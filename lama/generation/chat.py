"""Conversations: a chat template, and a cache that holds all turns so far."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from lama.data.inputs import check_tokens
from lama.errors import LamaError, UsageError
from lama.generation.engine import Engine, Event, Request
from lama.generation.sampling import Sampling
from lama.generation.text import Generation, end_tokens, generate
from lama.generation.tokens import without_error
from lama.models.protocol import CausalLM
from lama.tokenizers import Tokenizer
from lama.tokenizers.chat_template import ChatTemplate, Message, check_messages, encode_chat, template_of

NO_TEMPLATE = (
    "the model must have a chat template for a conversation; got none in its files. "
    "Use a model that was trained on conversations, or a plain template"
)


def template_for(tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a model. Raises LamaError for one without."""
    template = template_of(tokenizer)
    if template is None:
        raise LamaError(NO_TEMPLATE)
    return template


def chat(
    model: CausalLM,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: ChatTemplate | None = None,
    max_new_tokens: int = 1000,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    context: int | None = None,
    **options: object,
) -> Generation:
    """Answer a conversation: messages such as {"role": "user", "content": "Why is the sky blue?"}.

        print(lama.chat(model, tokenizer, [{"role": "user", "content": "Why is the sky blue?"}]))

    The other arguments are those of `generate`; `options` go to the template, by default the model's own.
    Raises LamaError for a model without a template, and as `generate` does.
    """
    check_messages(messages)
    ids = encode_chat(tokenizer, template or template_for(tokenizer), messages, options=options)
    return generate(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop,
        context=context,
    )


class Conversation:
    """Turns of a user and a model. The cache holds them all: a turn costs only its own tokens.

    `messages` may be changed between turns; from the first change on, they are then computed again.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        max_new_tokens: int = 1000,
        seed: int = 0,
        on_drop: Callable[[int], None] = lambda n: None,
        on_whole: Callable[[], None] = lambda: None,
        options: Mapping[str, object] | None = None,
        context: int | None = None,
    ):
        """`on_drop` gets the number of messages dropped because the context is full; see `encode_chat`."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.sampling, self.max_new_tokens, self.seed = sampling, max_new_tokens, seed
        self.on_drop, self.on_whole, self.options = on_drop, on_whole, dict(options or {})
        self.messages: list[dict[str, str]] = []
        self.last: Generation | None = None
        """The newest answer."""
        self._engine = Engine(model, 1, tokenizer.vocab_size, context=context, reuse=True)
        self._whole_said = False

    def ask(self, text: str) -> Iterator[str]:
        """Add a message of the user; yields pieces of the answer, which is then a message, even if cut short.

        Raises UsageError for a message that does not fit the context; it is then not added.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
        except LamaError:
            self.messages.pop()
            raise
        yield from self._answer(ids)

    def regenerate(self) -> Iterator[str]:
        """Answer the user's last message again, with the next seed. Raises UsageError if there is none."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise UsageError("there must be an answer to generate again; got an empty conversation")
        self.seed += 1
        yield from self._answer(self._fitting())

    @property
    def context(self) -> int:
        """The largest number of tokens of the conversation."""
        return self._engine.context

    def ids(self, add_generation_prompt: bool = True) -> list[int]:
        """The conversation as tokens."""
        found = encode_chat(
            self.tokenizer, self.template, self.messages, add_generation_prompt, self._whole, self.options
        )
        check_tokens(self.tokenizer, found, self.model.config.vocab_size)
        return found

    def _whole(self) -> None:
        if not self._whole_said:
            self._whole_said = True
            self.on_whole()

    def _fitting(self) -> list[int]:
        """The tokens of the conversation, without its oldest turns where it does not fit the context."""
        context, dropped = self._engine.context, 0
        while len(ids := self.ids()) >= context:
            first = 1 if self.messages[0]["role"] == "system" else 0
            end = next(
                (i for i in range(first + 1, len(self.messages)) if self.messages[i]["role"] == "user"), None
            )
            if end is None:
                got = f"got {len(ids)} tokens for a context of {context}"
                raise UsageError(f"a message must fit the context with room for an answer; {got}. Shorten it")
            dropped += end - first
            del self.messages[first:end]
        if dropped:
            self.on_drop(dropped)
        return ids

    def _answer(self, ids: list[int]) -> Iterator[str]:
        self.last = Generation(ids, self._events(ids), self.tokenizer, ())
        try:
            yield from self.last
        finally:
            self.messages.append({"role": "assistant", "content": self.last.text})

    def _events(self, ids: list[int]) -> Iterator[Event]:
        end = end_tokens(self.model, self.tokenizer)
        number = self._engine.submit(Request(ids, self.max_new_tokens, self.sampling, self.seed, end))
        try:
            while self._engine.is_busy:
                for event in self._engine.step():
                    yield without_error(event)
        finally:
            self._engine.cancel(number)
