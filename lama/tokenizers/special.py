"""Added and special tokens of Hugging Face's tokenizer files, with their flags and ids.

Source: transformers 5, `_from_pretrained` in tokenization_utils_base.py and `TokenizersBackend.__init__`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from lama.errors import LamaError, quoted
from lama.files import checked, field

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
MOST_IDS = 1 << 24  # a limit for tables of a vocabulary's size
LONGEST = 10_000  # characters of an added token; `lama.data.pieces.AHEAD` is more
NO_ID = -1
Role: TypeAlias = str | tuple[int]  # such as eos_token; (i,) for the special token i of a list


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for its exact text, found before the text is split. Fields as in tokenizer.json.

    `lstrip` and `rstrip` include the white space on that side. `normalized` tokens are searched last.
    """

    content: str
    id: int = NO_ID
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = False
    special: bool = True


def check_id(token: object, number: object, source: object) -> int:
    """The id. Raises LamaError for any other value."""
    if type(number) is not int or not 0 <= number < MOST_IDS:
        rule = f"an id from 0 to {MOST_IDS - 1:,}"
        got = f"{quoted(token)}: {quoted(number)} in {source}"
        raise LamaError(f"a vocabulary must give every token {rule}; got {got}")
    return number


def special_tokens(
    own: Mapping[str, str],
    config: Mapping[str, object],
    older: Mapping[str, object],
    added: Mapping[str, object],
    spec: Mapping[str, object],
    source: object,
) -> tuple[dict[Role, AddedToken | None], list[AddedToken]]:
    """The token of each role, such as eos_token, and all added tokens in their order. Raises LamaError.

    `own` are the tokens of a class of transformers, which files may override; without them the added tokens
    of tokenizer.json, `spec`, come first. `config` is tokenizer_config.json. `older` and `added`,
    special_tokens_map.json and added_tokens.json, count only if it has no added_tokens_decoder.
    """
    listed = [_listed(fields, source) for fields in field(spec, "added_tokens", list, source, [])]
    decoder = field(config, "added_tokens_decoder", dict, source, None)
    named: dict[Role, AddedToken | None] = dict.fromkeys(ROLES)
    named |= {role: AddedToken(token) for role, token in own.items()}
    texts: set[str] = set()  # special among the tokens of added_tokens.json
    for fields, is_older in ((config, False), (older if decoder is None else {}, True)):
        roles: dict[Role, object] = {}
        for key, value in fields.items():
            if key in ROLES or (key.endswith("_token") and isinstance(value, str | dict)):
                roles[key] = value
        if not is_older or not config.keys() & EXTRA:
            others = fields.get(EXTRA[0]) or fields.get(EXTRA[1]) or {}
            if isinstance(others, dict):
                roles |= others
            else:
                extra = checked(others, list, f"special tokens in {source}")
                roles |= {(i,): value for i, value in enumerate(extra)}
        for role, value in roles.items():
            named[role] = token = _token(value, source, is_older)
            is_extra = isinstance(role, tuple) and (not is_older or EXTRA[0] in fields)
            if token and (is_older or isinstance(value, str)) and (role in ROLES or is_extra):
                texts.add(token.content)
    numbered: list[AddedToken] = []
    if decoder is None:
        for text, number in added.items():
            is_special = text in texts
            plain = {"content": text, "id": number, "special": is_special, "normalized": not is_special}
            numbered.append(_listed(plain, source))
        numbered += listed
    else:
        for key, value in decoder.items():
            fields = checked(value, dict, f"a token in {source}")
            is_number = key.isascii() and key.isdigit() and len(key) < 10
            numbered.append(_listed({**fields, "id": int(key) if is_number else key}, source))
    by_id = {token.id: token for token in numbered}
    by_content = {token.content: token for token in by_id.values()}
    named = {role: token and by_content.get(token.content, token) for role, token in named.items()}
    found = [by_id[number] for number in sorted(by_id)]
    known = by_content.keys() | ({} if own else {token.content for token in listed})
    for token in named.values():
        if token and token.content not in known and token not in found:
            found.append(token)
    of_roles = {token.content for role, token in named.items() if token and isinstance(role, str)}
    found = [replace(token, special=token.special or token.content in of_roles) for token in found]
    tokens = found if own else listed + found
    return named, [replace(t, normalized=not t.special) if t.normalized is None else t for t in tokens]


def number_tokens(
    tokens: Iterable[AddedToken], vocabulary: Mapping[str, int], grow: bool
) -> list[AddedToken]:
    """The tokens with their ids: the vocabulary's, else the file's if it is free, else the next free one.

    Without `grow`, a token with neither is left out.
    """
    ids: dict[str, int] = {}
    taken, following = set(vocabulary.values()), len(vocabulary)
    numbered = []
    for token in tokens:
        content, number = token.content, token.id
        if content in vocabulary or content in ids:
            number = vocabulary[content] if content in vocabulary else ids[content]
        elif number == NO_ID and not grow:
            continue
        elif number == NO_ID or number in taken:
            while following in taken:
                following += 1
            number = following
        ids[content] = number
        taken.add(number)
        following = max(following, number + 1)
        numbered.append(replace(token, id=number))
    return numbered


def _token(value: object, source: object, is_special: bool = False) -> AddedToken | None:
    """A token that a file writes as a text or with its flags; `is_special` overrides the file."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return _token({"content": value, "normalized": False}, source, True)
    fields = checked(value, dict, f"a token in {source}")
    content = field(fields, "content", str, source)
    if not 0 < len(content) <= LONGEST:
        rule = f"have 1 to {LONGEST:,} characters"
        raise LamaError(f"an added token must {rule}; got {quoted(content)} in {source}")
    flags = {name: field(fields, name, bool, source, False) for name in ("single_word", "lstrip", "rstrip")}
    is_special = is_special or field(fields, "special", bool, source, False)
    normalized = field(fields, "normalized", bool, source, None)
    return AddedToken(content, normalized=normalized, special=is_special, **flags)


def _listed(fields: object, source: object) -> AddedToken:
    """An added token that a file writes with its id. Raises LamaError without one."""
    known = fields if isinstance(fields, dict) else {}
    if not known.keys() >= {"content", "id"} or (token := _token(known, source)) is None:
        raise LamaError(f"an added token must have content and an id; got {quoted(fields)} in {source}")
    return replace(token, id=check_id(token.content, known["id"], source))
