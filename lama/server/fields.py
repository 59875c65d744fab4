"""Fields of a request's JSON object, checked by type and range."""

from collections.abc import Mapping

from lama.errors import LamaError, UsageError, quoted
from lama.models.protocol import CausalLM
from lama.tokenizers import Tokenizer

Body = Mapping[str, object]
"""The JSON object of a request."""
LONGEST_TEXT = 1 << 20  # characters of a prompt; a longer one is refused before it is encoded


class BadField(UsageError):
    """A field with a wrong value; `param` is its name, as in OpenAI's errors."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


def refuse(param: str, rule: str, got: object) -> BadField:
    """The error for a value that breaks a rule, such as `be at least 1`."""
    return BadField(param, f"{param} must {rule}; got {quoted(got, 80)}")


def integer(body: Body, name: str, least: int, most: int, default: int) -> int:
    """A whole number from `least` to `most`; null counts as absent. Raises BadField."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise refuse(name, f"be a whole number from {least} to {most}", value)
    return value


def boolean(body: Body, name: str, default: bool = False) -> bool:
    """True or false; null counts as absent. Raises BadField."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise refuse(name, "be true or false", value)
    return value


def choice(body: Body, name: str, choices: tuple[str, ...]) -> str:
    """One of the choices, by default the first. Raises BadField."""
    value = body.get(name)
    if value is None:
        return choices[0]
    if not isinstance(value, str) or value not in choices:
        raise refuse(name, f"be one of {', '.join(choices)}", value)
    return value


def indices(body: Body, name: str, n: int) -> list[int] | None:
    """A list of indices below n, as whole numbers from 0 on, negative ones from the end; None if absent.

    Raises BadField.
    """
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not value or len(value) > n:
        raise refuse(name, f"be a list of 1 to {n} whole numbers", value)
    for each in value:
        if type(each) is not int or not -n <= each < n:
            raise refuse(name, f"hold whole numbers from 0 to {n - 1}, or from -{n} to -1 from the end", each)
    return [each % n for each in value]


def texts(body: Body, name: str, most: int) -> list[str]:
    """A list of 1 to `most` strings, or one string. Raises BadField."""
    value = body.get(name)
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not 1 <= len(found) <= most:
        raise refuse(name, f"be a list of 1 to {most} strings", value)
    for each in found:
        if not isinstance(each, str):
            raise refuse(name, "hold strings", each)
    return [str(each) for each in found]


def token_ids(body: Body, name: str, vocab_size: int) -> list[int]:
    """A list of token ids below `vocab_size`, at least one. Raises BadField."""
    value = body.get(name)
    if not isinstance(value, list) or not value:
        raise refuse(name, "be a text or a list of token ids, not empty", value)
    for each in value:
        if type(each) is not int or not 0 <= each < vocab_size:
            raise refuse(name, f"hold token ids from 0 to {vocab_size - 1}", each)
    return list(value)


def encoded(tokenizer: Tokenizer, text: str, name: str, vocab_size: int) -> list[int]:
    """The tokens of a text in the field `name`, all below `vocab_size`. Raises BadField."""
    try:
        ids = tokenizer.encode(text)
    except LamaError as error:
        raise BadField(name, f"{name} cannot be encoded: {error}") from None
    if unknown := [i for i in ids if i >= vocab_size]:
        raise refuse(name, f"be made of the model's {vocab_size} tokens", unknown[0])
    return ids


def prompt_tokens(model: CausalLM, tokenizer: Tokenizer, body: Body, most: int) -> list[int]:
    """The tokens of the field `prompt`, a text or ids: 1 to `most`. Raises BadField."""
    value, rows = body.get("prompt"), model.config.vocab_size
    if isinstance(value, str) and value:
        rule = f"have at most {most} tokens"
        if len(value) > LONGEST_TEXT:
            raise refuse("prompt", rule, f"{len(value):,} characters")
        ids = encoded(tokenizer, value, "prompt", rows)
    else:
        ids = token_ids(body, "prompt", rows)
    if len(ids) > most:
        raise BadField("prompt", f"prompt must have at most {most} tokens; got {len(ids)}. Shorten it")
    return ids
