"""/v1/chat/completions: answer conversations, with the model's chat template."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from lama.errors import LamaError
from lama.files import parse_json
from lama.generation.engine import Constraint, TokenLogprob
from lama.server.answers import Answer, Piece, Usage, answers, check_length, fits, heading
from lama.server.completions import joined
from lama.server.constraints import constraint_of, tool_constraint
from lama.server.fields import BadField, Body, boolean, integer, refuse
from lama.server.schema import COMMON, MOST_LOGPROBS, Options, check_absent, read_options
from lama.server.service import Backend, Service
from lama.server.tools import ToolStream, read_tools
from lama.tokenizers.chat_template import ChatTemplate, encode_chat

KNOWN = (
    *COMMON,
    *("messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt"),
)
MOST_MESSAGES = 4096


async def chat_completions(service: Service, body: Body) -> Answer:
    """Answer a conversation. Raises BadField, Refused and QueueFull."""
    backend = service.backend_for(body)
    service.note_unused(body, KNOWN)
    for name in ("functions", "function_call"):
        check_absent(body, name, "use tools and tool_choice")
    if body.get("max_completion_tokens") is not None:
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    options = read_options(service, body, None)
    top = integer(body, "top_logprobs", 0, MOST_LOGPROBS, 0)
    if boolean(body, "logprobs"):
        options = replace(options, logprobs=top)
    elif top:
        raise BadField("top_logprobs", "top_logprobs must come with logprobs true; got none")
    tools = read_tools(body, template_of(backend))
    tokens = await asyncio.to_thread(read_conversation, backend, body)
    fits(backend, tokens, "messages")
    constraint = await asyncio.to_thread(read_format, backend, body, tools.demanded)
    writer = ChatWriter(backend, options, tokens, bool(tools.tools), constraint)
    return writer.stream() if options.stream else await writer.whole()


def read_format(
    backend: Backend, body: Body, demanded: Sequence[Mapping[str, object]] = ()
) -> Callable[[], Constraint | None] | None:
    """A function that makes the constraint of an answer; None if any text is allowed. Raises BadField.

    The constraint demands a call of one of the `demanded` functions, else it follows `response_format`.
    """
    make: Callable[[], Constraint | None]
    if demanded:
        make = partial(tool_constraint, backend.tokenizer, demanded, backend.end)
    else:
        make = partial(constraint_of, backend.tokenizer, body.get("response_format"), backend.end)
    return None if make() is None else make  # a wrong schema is an error before the answer begins


def template_of(backend: Backend) -> ChatTemplate:
    """The chat template. Raises BadField for a model without one."""
    if backend.template is None:
        message = "the model has no chat template; send a text to /v1/completions"
        raise BadField("messages", message)
    return backend.template


def read_conversation(backend: Backend, body: Body) -> list[int]:
    """The conversation of a request, with its tools, as tokens. Raises BadField."""
    template, value = template_of(backend), body.get("messages")
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise refuse("messages", f"be a list of 1 to {MOST_MESSAGES} messages", value)
    messages = [read_message(each, f"messages[{i}]") for i, each in enumerate(value)]
    check_length(backend, sum(len(str(each["content"])) for each in messages), "messages")
    given = body.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        raise refuse("chat_template_kwargs", "be an object", given)
    options = {name: each for name, each in (given or {}).items() if name not in ("messages", "tools")}
    if tools := read_tools(body, template).tools:
        options["tools"] = tools
    prompt = boolean(body, "add_generation_prompt", default=True)
    options.pop("add_generation_prompt", None)
    try:
        ids = encode_chat(backend.tokenizer, template, messages, prompt, options=options)
    except LamaError as error:
        raise BadField("messages", str(error)) from None
    if ids and max(ids) >= (rows := backend.model.config.vocab_size):
        raise refuse("messages", f"be made of the model's {rows} tokens", max(ids))
    return ids


def read_message(value: object, name: str) -> dict[str, object]:
    """A message as templates expect it, with a text as content and objects as arguments. Raises BadField."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise refuse(name, 'be {"role": ..., "content": ...}', value)
    found: dict[str, object] = dict(value)
    if found["role"] == "developer":  # OpenAI's newer name
        found["role"] = "system"
    content, calls = found.get("content"), found.get("tool_calls")
    if isinstance(content, list):
        parts = [read_part(each, f"{name}.content[{i}]") for i, each in enumerate(content)]
        found["content"] = "\n".join(parts)
    elif content is None and calls:
        found["content"] = ""
    elif not isinstance(content, str):
        raise refuse(f"{name}.content", "be a text or a list of parts of text", content)
    if calls is not None:
        if not isinstance(calls, list):
            raise refuse(f"{name}.tool_calls", "be a list", calls)
        found["tool_calls"] = [read_call(each, f"{name}.tool_calls[{i}]") for i, each in enumerate(calls)]
    return found


def read_part(value: object, name: str) -> str:
    """The text of one part of a message's content. Raises BadField for other types, such as images."""
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise refuse(name, 'be {"type": "text", "text": ...}', value)
    return str(value["text"])


def read_call(value: object, name: str) -> dict[str, object]:
    """A call of a tool by the assistant, its arguments as an object. Raises BadField."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict):
        raise refuse(name, 'be {"type": "function", "function": ...}', value)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments.encode(), "arguments")
        except LamaError:
            raise refuse(f"{name}.function.arguments", "be JSON", arguments) from None
    return {**value, "function": {**function, "arguments": arguments}}


class ChatWriter:
    """OpenAI's objects of the answers to a conversation."""

    def __init__(
        self,
        backend: Backend,
        options: Options,
        tokens: list[int],
        has_tools: bool,
        constraint: Callable[[], Constraint | None] | None,
    ):
        self.backend, self.options, self.tokens = backend, options, tokens
        self.usage = Usage()
        self._tools = [ToolStream() for _ in range(options.n)] if has_tools else []
        self._started = [False] * options.n
        self._answers = partial(answers, backend, [tokens], options, self.usage, constraint=constraint)
        self._base = heading(backend, "chatcmpl")

    async def whole(self) -> dict[str, object]:
        """The answer in one object."""
        choices: list[dict[str, object]] = [{} for _ in self._started]
        async with aclosing(self._answers()) as pieces:
            async for piece in pieces:
                for each in self._choices(piece):
                    joined(choices[piece.index], each)
        for choice in choices:
            message = choice.pop("delta")
            assert isinstance(message, dict)
            if calls := message.get("tool_calls"):
                message["content"] = message["content"] or None
                message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
            choice["message"] = message
        usage = self.usage.to_json()
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": usage}

    async def stream(self) -> AsyncGenerator[Mapping[str, object], None]:
        """The answer in pieces."""
        base = {**self._base, "object": "chat.completion.chunk"}
        async with aclosing(self._answers()) as pieces:
            async for piece in pieces:
                for choice in self._choices(piece):
                    yield {**base, "choices": [choice]}
        if self.options.include_usage:
            yield {**base, "choices": [], "usage": self.usage.to_json()}

    def _choices(self, piece: Piece) -> list[dict[str, object]]:
        """A piece as parts of a choice: the role comes first, the finish reason is a part of its own."""
        found: list[dict[str, object]] = []
        logprobs = None if self.options.logprobs is None else {"content": self._logprobs(piece.logprobs)}

        def add(delta: Mapping[str, object], **more: object) -> None:
            choice = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
            found.append(choice | more)

        if not self._started[piece.index]:
            self._started[piece.index] = True
            ids = {"prompt_token_ids": self.tokens} if self.options.token_ids else {}
            add({"role": "assistant", "content": ""}, **ids)
        delta, calls = self._delta(piece)
        scores: dict[str, object] = {"logprobs": logprobs}
        if self.options.stream or self.options.token_ids:
            scores["token_ids"] = piece.tokens
        if delta or piece.finish_reason is None:
            add({"content": delta} if delta else {}, **scores)
            scores = {}
        if calls:
            add({"tool_calls": calls})
        if piece.finish_reason is not None:
            reason = "tool_calls" if calls and piece.finish_reason == "stop" else piece.finish_reason
            full = {"context_full": True} if piece.context_full else {}
            add({}, finish_reason=reason, **scores, **full)
        return found

    def _delta(self, piece: Piece) -> tuple[str, list[dict[str, object]]]:
        """The content that can be shown so far and, with the last piece, the calls of tools."""
        if not self._tools:
            return piece.text, []
        stream = self._tools[piece.index]
        content = stream.push(piece.text)
        if piece.finish_reason is None:
            return content, []
        rest, calls = stream.finish()
        return content + rest, [{"index": i, **call} for i, call in enumerate(calls)]

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> list[dict[str, object]]:
        """Tokens with their log-probabilities, and those of the most likely ones."""

        def entry(token: int, logprob: float) -> dict[str, object]:
            text, raw = self.backend.piece(token)
            return {"id": token, "token": text, "logprob": logprob, "bytes": raw}  # id as llama.cpp's server

        return [
            {
                **entry(score.token, score.logprob),
                "top_logprobs": [entry(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ]
