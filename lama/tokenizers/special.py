"""Added and special tokens of Hugging Face's tokenizer files: which there are, with which flags and ids.

Source: transformers 5, `_from_pretrained` in tokenization_utils_base.py and `TokenizersBackend.__init__`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lama.errors import LamaError, quoted
from lama.files import checked, field

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip")
MOST_IDS = 1 << 24  # so that nothing of a vocabulary's size is too large
LONGEST = 10_000  # characters of an added token; `lama.data.tokens.AHEAD` is more

Token = dict[str, Any]  # as tokenizer.json writes an added token; its id may be None


def special(content: str, number: int | None = None) -> Token:
    """A special token that is found as it is written."""
    return {"id": number, "content": content} | dict.fromkeys((*FLAGS, "normalized"), False) | {"special": True}


def check_id(token: object, number: Any, source: object) -> int:
    """The id. Raises LamaError for any other value."""
    if type(number) is not int or not 0 <= number < MOST_IDS:
        rule = f"an id from 0 to {MOST_IDS - 1:,}"
        raise LamaError(f"a vocabulary must give every token {rule}; got {quoted(token)}: {quoted(number)} in {source}")
    return number


def special_tokens(
    own: Mapping[str, str],
    config: Mapping[str, Any],
    older: Mapping[str, Any],
    added: Mapping[str, Any],
    spec: Mapping[str, Any],
    source: object,
) -> tuple[dict[Any, Token | None], list[Token]]:
    """The token of each role, such as eos_token, and all added tokens in the order of adding. Raises LamaError.

    `own` are the tokens of a class of transformers, where no file names others; without one, the added tokens of
    tokenizer.json, `spec`, come first. `config`, `older` and `added` are tokenizer_config.json, special_tokens_map.json
    and added_tokens.json; the last two count only where the first has no added_tokens_decoder.
    """
    listed = [_listed(fields, source) for fields in field(spec, "added_tokens", list, source, [])]
    decoder = field(config, "added_tokens_decoder", dict, source, None)
    named: dict[Any, Token | None] = dict.fromkeys(ROLES)
    named |= {role: special(token) for role, token in own.items()}
    texts: set[str] = set()  # special among the tokens of added_tokens.json
    for fields, known in ((config, {}), ({} if decoder is not None else older, {"special": True})):
        roles = {k: v for k, v in fields.items() if k in ROLES or (k.endswith("_token") and isinstance(v, str | dict))}
        if fields is config or not config.keys() & EXTRA:
            others = fields.get(EXTRA[0]) or fields.get(EXTRA[1]) or {}
            if not isinstance(others, dict):
                others = {(i,): token for i, token in enumerate(checked(others, list, f"special tokens in {source}"))}
            roles |= others
        named |= (tokens := {role: _token(token, source, **known) for role, token in roles.items()})
        counted = {*ROLES, *(role for role in roles if isinstance(role, tuple) and (fields is config or EXTRA[0] in fields))}
        texts |= {t["content"] for role, t in tokens.items() if t and role in counted and (known or isinstance(roles[role], str))}
    if decoder is None:
        plain = [{"content": text, "id": i, "special": text in texts, "normalized": text not in texts} for text, i in added.items()]
        numbered = [_listed(fields, source) for fields in plain] + listed
    else:
        numbered = [_listed(checked(t, dict, f"a token in {source}") | {"id": _number(i)}, source) for i, t in decoder.items()]
    by_id = {token["id"]: token for token in numbered}
    by_content = {token["content"]: token for token in by_id.values()}
    named = {role: token and by_content.get(token["content"], token) for role, token in named.items()}
    found = [by_id[number] for number in sorted(by_id)]
    there = by_content.keys() | ({} if own else {token["content"] for token in listed})
    for token in named.values():
        if token and token["content"] not in there and token not in found:
            found.append(token)
    of_roles = {token["content"] for role, token in named.items() if token and isinstance(role, str)}
    found = [token | {"special": token["special"] or token["content"] in of_roles} for token in found]
    found = found if own else listed + found
    return named, [token | {"normalized": not token["special"]} if token["normalized"] is None else token for token in found]


def number_tokens(tokens: Iterable[Token], vocabulary: Mapping[str, int], grow: bool) -> list[Token]:
    """The tokens with their ids: that of the vocabulary, else that of a file if it is free, else the next.

    Without `grow`, a token with neither is left out.
    """
    ids: dict[str, int] = {}
    taken, following = set(vocabulary.values()), len(vocabulary)
    numbered = []
    for token in tokens:
        content, number = token["content"], token["id"]
        if content in vocabulary or content in ids:
            number = vocabulary.get(content, ids.get(content))
        elif number is None and not grow:
            continue
        elif number is None or number in taken:
            while following in taken:
                following += 1
            number = following
        ids[content] = number
        taken.add(number)
        following = max(following, number + 1)
        numbered.append(token | {"id": number})
    return numbered


def _token(value: Any, source: object, **known: Any) -> Token | None:
    """A token that a file writes as a text or with its flags; `known` are flags that it does not write."""
    if value is None or value == "":
        return None
    fields = special(value) if isinstance(value, str) else checked(value, dict, f"a token in {source}") | known
    content = field(fields, "content", str, source)
    if not 0 < len(content) <= LONGEST:
        raise LamaError(f"an added token must have 1 to {LONGEST:,} characters; got {quoted(content)} in {source}")
    flags = {flag: field(fields, flag, bool, source, False) for flag in (*FLAGS, "special")}
    return {"id": None, "content": content, **flags, "normalized": field(fields, "normalized", bool, source, None)}


def _listed(fields: Any, source: object) -> Token:
    """An added token that a file writes with its id. Raises LamaError for one without."""
    if not isinstance(fields, dict) or not {"content", "id"} <= fields.keys() or (token := _token(fields, source)) is None:
        raise LamaError(f"an added token must have content and an id; got {quoted(fields)} in {source}")
    return token | {"id": check_id(token["content"], fields["id"], source)}


def _number(key: str) -> int | str:
    """The id that a key of added_tokens_decoder is; the key itself where it is none, for an error that shows it."""
    return int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key
