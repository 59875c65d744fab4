"""The fields of requests that generate text, checked by type and range."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lama.errors import UsageError
from lama.files import parse_json
from lama.generation.sampling import Sampling
from lama.server.errors import Refused
from lama.server.fields import BadField, Body, boolean, integer, refuse, texts
from lama.server.service import Backend, Service

MOST_LOGPROBS = 20
MOST_STOPS = 64
LONGEST_STOP = 1000  # characters
MOST_BIASES = 1024
SEEDS = 1 << 63
SAMPLING = tuple(each.name for each in fields(Sampling))
COMMON = (
    *SAMPLING,
    *("model", "seed", "n", "max_tokens", "stop", "stream", "stream_options", "ignore_eos", "logit_bias"),
    *("logprobs", "return_token_ids", "user"),
)
"""Fields that completions and chat have in common."""


@dataclass(frozen=True)
class Options:
    """How to continue the prompts of a request."""

    sampling: Sampling
    seed: int
    n: int
    max_tokens: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    token_ids: bool
    """Whether the answer has the ids of the prompt and of the text."""
    logprobs: int | None = None
    """Number of most likely tokens to report with each token."""


def parse_body(raw: bytes) -> dict[str, object]:
    """The JSON object of a request. Raises LamaError."""
    found = parse_json(raw, "the body", "Send a JSON object")
    if not isinstance(found, dict):
        raise Refused(400, "the body must be a JSON object; got another value")
    return found


def read_options(service: Service, body: Body, default_tokens: int | None, least: int = 1) -> Options:
    """The options of a request, without its log-probabilities. Raises BadField.

    `default_tokens` is the default of max_tokens; None means as many as the context holds.
    """
    backend, limits = service.backend, service.limits
    most = min(limits.max_tokens or backend.context, backend.context)
    given = limits.max_tokens or SEEDS  # a larger number than the context holds is no error
    max_tokens = min(most, integer(body, "max_tokens", least, given, min(default_tokens or most, most)))
    seed = integer(body, "seed", -1, SEEDS - 1, -1)
    stream_options = body.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise refuse("stream_options", "be an object", stream_options)
    return Options(
        sampling=read_sampling(backend, body),
        seed=secrets.randbits(31) if seed < 0 else seed,
        n=integer(body, "n", 1, limits.max_n, 1),
        max_tokens=max_tokens,
        stop=read_stops(body),
        stream=boolean(body, "stream"),
        include_usage=boolean(stream_options or {}, "include_usage"),
        ignore_eos=boolean(body, "ignore_eos"),
        logit_bias=read_bias(body, backend.vocab_size),
        token_ids=boolean(body, "return_token_ids"),
    )


def read_sampling(backend: Backend, body: Body) -> Sampling:
    """The values of `Sampling` that a request gives, else the model's own. Raises BadField."""
    found = dict(backend.sampling)
    for name in SAMPLING:
        if body.get(name) is not None:
            found[name] = number(body, name)
    if found.get("top_k") == -1:  # as vLLM
        found["top_k"] = 0
    found["top_k"] = integer(found, "top_k", 0, SEEDS, 0)
    try:
        return Sampling(**found)  # type: ignore[arg-type]
    except UsageError as error:
        raise BadField(str(error).split()[0], str(error)) from None


def number(body: Body, name: str) -> float:
    """A number, whole or not. Raises BadField."""
    value = body[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise refuse(name, "be a number", value)
    return value


def read_stops(body: Body) -> tuple[str, ...]:
    """The strings that end the text, none by default. Raises BadField."""
    if body.get("stop") in (None, []):
        return ()
    found = texts(body, "stop", MOST_STOPS)
    for each in found:
        if not 0 < len(each) <= LONGEST_STOP:
            raise refuse("stop", f"hold strings of 1 to {LONGEST_STOP} characters", each)
    return tuple(found)


def read_bias(body: Body, vocab_size: int) -> dict[int, float]:
    """The numbers to add to logits, by token, from {"50256": -100}. Raises BadField."""
    value, name = body.get("logit_bias"), "logit_bias"
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise refuse(name, f"be an object of at most {MOST_BIASES} token ids", value)
    found: dict[int, float] = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            raise refuse(name, f"have token ids below {vocab_size} as names", token)
        if not isinstance(bias, int | float) or isinstance(bias, bool) or not -100 <= bias <= 100:
            raise refuse(name, "have numbers from -100 to 100", bias)
        found[int(token)] = float(bias)
    return found


def check_absent(body: Body, name: str, advice: str, *but: object) -> None:
    """Raise BadField for a field that this server refuses, unless its value has no effect."""
    if body.get(name) not in (None, *but):
        raise BadField(name, f"{name} is not supported; {advice}")
