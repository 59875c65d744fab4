"""/v1/completions: continue texts, with log-probabilities of the answer and of the prompt."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from lama.generation.engine import TokenLogprob
from lama.server.answers import Answer, Piece, Usage, answers, check_length, fits, heading
from lama.server.fields import BadField, Body, boolean, encoded, integer, refuse, token_ids
from lama.server.schema import COMMON, MOST_LOGPROBS, Options, check_absent, read_options
from lama.server.service import Backend, Service
from lama.tokenizers import StreamDecoder

KNOWN = (*COMMON, "prompt", "echo", "best_of", "suffix")
DEFAULT_TOKENS = 16  # OpenAI's


async def completions(service: Service, body: Body) -> Answer:
    """Continue one prompt or several, each a text or token ids. Raises BadField, Refused and QueueFull."""
    backend = service.backend_for(body)
    service.note_unused(body, KNOWN)
    check_absent(body, "best_of", "ask for n answers and choose among them", 1)
    check_absent(body, "suffix", "the model only continues a text", "")
    echo, logprobs = boolean(body, "echo"), integer(body, "logprobs", 0, MOST_LOGPROBS, -1)
    options = read_options(service, body, DEFAULT_TOKENS, least=0 if echo else 1)
    options = replace(options, logprobs=None if logprobs < 0 else logprobs)
    prompts = await asyncio.to_thread(read_prompts, backend, body, service.limits.max_n // options.n)
    writer = Writer(backend, options, prompts, echo)
    return writer.stream() if options.stream else await writer.whole()


def read_prompts(backend: Backend, body: Body, most: int) -> list[tuple[str, list[int]]]:
    """The prompts of a request as text and tokens. Raises BadField and Refused."""
    value, name = body.get("prompt"), "prompt"
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise refuse(name, "be a text, token ids, or a list of either, not empty", value)
    if len(value) > most:
        raise BadField(name, f"prompt must hold at most {most} prompts with this n; got {len(value)}")
    return [read_prompt(backend, each, name) for each in value]


def read_prompt(backend: Backend, value: object, name: str) -> tuple[str, list[int]]:
    """The text and the tokens of one prompt, a text or token ids. Raises BadField and Refused."""
    rows = backend.model.config.vocab_size
    if isinstance(value, str):
        check_length(backend, len(value), name)
        ids, text = encoded(backend.tokenizer, value, name, rows), value
    else:
        ids = token_ids({name: value}, name, rows)
        text = backend.tokenizer.decode([i for i in ids if i < backend.tokenizer.vocab_size])
    fits(backend, ids, name)
    return text, ids


class Writer:
    """OpenAI's objects of the answers to a request."""

    def __init__(
        self, backend: Backend, options: Options, prompts: Sequence[tuple[str, list[int]]], echo: bool
    ):
        self.backend, self.options, self.prompts, self.echo = backend, options, prompts, echo
        self.usage = Usage()
        n = len(prompts) * options.n
        self._decoders = [StreamDecoder(backend.tokenizer) for _ in range(n)]
        self._offsets = [0] * n
        self._started = [False] * n
        self._base = {**heading(backend, "cmpl"), "object": "text_completion"}

    async def whole(self) -> dict[str, object]:
        """The answer in one object."""
        choices: list[dict[str, object]] = [{} for _ in self._started]
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                joined(choices[piece.index], self._choice(piece))
        return {**self._base, "choices": choices, "usage": self.usage.to_json()}

    async def stream(self) -> AsyncGenerator[Mapping[str, object], None]:
        """The answer in pieces."""
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                yield {**self._base, "choices": [self._choice(piece)]}
        if self.options.include_usage:
            yield {**self._base, "choices": [], "usage": self.usage.to_json()}

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        options, ids = self.options, [tokens for _, tokens in self.prompts]
        if options.max_tokens == 0 and options.logprobs is None:  # only the prompt's text is asked for
            self.usage.prompt_tokens = sum(map(len, ids))
            for index in range(len(self._started)):
                yield Piece(index, finish_reason="length")
            return
        scored = options.logprobs if self.echo else None
        found = answers(self.backend, ids, options, self.usage, prompt_logprobs=scored)
        async with aclosing(found):
            async for piece in found:
                yield piece

    def _choice(self, piece: Piece) -> dict[str, object]:
        index, options = piece.index, self.options
        prompt, ids = self.prompts[index // options.n]
        text, tokens, scores = piece.text, piece.tokens, list[TokenLogprob | None](piece.logprobs)
        choice: dict[str, object] = {"index": index}
        if not self._started[index]:
            self._started[index] = True
            if self.echo:
                text, tokens = prompt + text, [*ids, *tokens]
                scores = [*(piece.prompt_logprobs or ()), *scores]
            if options.token_ids:
                choice["prompt_token_ids"] = ids
        logprobs = None if options.logprobs is None else self._logprobs(index, tokens, scores)
        choice |= {"text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        if options.stream or options.token_ids:
            choice["token_ids"] = piece.tokens
        if piece.context_full:
            choice["context_full"] = True
        return choice

    def _logprobs(
        self, index: int, tokens: Sequence[int], scores: Sequence[TokenLogprob | None]
    ) -> dict[str, list[object]]:
        """OpenAI's `logprobs`: texts, log-probabilities and offsets of tokens, and the most likely tokens."""
        backend, decoder = self.backend, self._decoders[index]
        found: dict[str, list[object]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for token, score in zip(tokens, scores, strict=True):
            found["tokens"].append(backend.piece(token)[0])
            found["token_logprobs"].append(score and score.logprob)
            found["top_logprobs"].append(score and top_logprobs(backend, score))
            found["text_offset"].append(self._offsets[index])
            if token < backend.tokenizer.vocab_size:
                self._offsets[index] += len(decoder.push(token))
        return found


def top_logprobs(backend: Backend, score: TokenLogprob) -> dict[str, float]:
    """The log-probabilities of the most likely tokens, and of the token itself, by their texts."""
    found: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        found.setdefault(backend.piece(token)[0], logprob)
    return found


def joined(whole: dict[str, object], part: Mapping[str, object]) -> None:
    """Add a piece to a choice, in place: texts and lists are appended, other values replaced."""
    for name, value in part.items():
        before = whole.get(name)
        if name == "index" or before is None:
            whole[name] = value
        elif isinstance(before, dict) and isinstance(value, dict):
            joined(before, value)
        elif isinstance(before, str) and isinstance(value, str):
            whole[name] = before + value
        elif isinstance(before, list) and isinstance(value, list):
            before += value
        elif value is not None:
            whole[name] = value
