"""Training conversations as token ids, from rows of messages, prompt and completion, text, or pairs.

The formats are those of mlx-lm (LORA.md) and of OpenAI's fine-tuning; for pairs those of trl's DPO.
"""

import hashlib
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lama.data.corpora import Corpus
from lama.data.records import Row, reading, rows_of
from lama.data.shards import dtype_of
from lama.data.tokens import PARTS, Progress, TokenFiles, TokenWriter, open_tokens
from lama.errors import LamaError, quoted
from lama.files import field, quoted_path
from lama.shapes import Array
from lama.tokenizers import Tokenizer
from lama.tokenizers.chat_template import ChatTemplate, Message, encode_marked

COLUMNS = ("messages", "prompt", "completion", "text")
ANSWERS = ("chosen", "rejected")
FOLLOWS = {
    "system": ("",),
    "developer": ("",),
    "user": ("", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""For each role, the roles that it may follow; "" is the beginning."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as tokens."""

    ids: Array
    counted: Array
    """Whether each token counts in the loss."""
    place: float
    """A number from 0 to 1 that depends only on the text, so that equal texts are in the same part."""
    is_cut: bool
    """Whether tokens at its end were dropped."""


def messages_of(row: Row, where: str) -> list[Message] | str:
    """The messages of a row, or its text. Raises LamaError for other rows and roles in the wrong order."""
    there = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    if "messages" in there:
        return check_order(field(there, "messages", list, where), where)
    if {"prompt", "completion"} <= there.keys():
        prompt, completion = (field(there, name, str, where) for name in ("prompt", "completion"))
        pair = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return check_order(pair, where)
    if "text" in there:
        return field(there, "text", str, where)
    advice = ". Use --dpo 0.1 to learn from pairs" if set(ANSWERS) <= row.keys() else ""
    raise LamaError(f"{where} must have messages, prompt and completion, or text; got {_keys(row)}{advice}")


def _keys(row: Row) -> str:
    there = ", ".join(str(key) for key, value in row.items() if value is not None)
    return quoted(there or "nothing", plain=True)


def pair_of(row: Row, where: str) -> list[list[Message]]:
    """The conversations with the chosen and with the rejected answer. Raises LamaError.

    An answer is a text, messages that follow the prompt, or the whole conversation. The prompt is a text or
    messages.
    """
    if not set(ANSWERS) <= {name for name, value in row.items() if value is not None}:
        raise LamaError(f"{where} must have chosen and rejected for --dpo; got {_keys(row)}")
    prompt = row.get("prompt")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    found = []
    for name in ANSWERS:
        answer: Any = row[name]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if not isinstance(answer, list) or not isinstance(before, list):
            raise LamaError(f"{name} and prompt must be texts or messages; got {quoted(row, 80)} in {where}")
        is_whole = answer and isinstance(answer[0], dict) and answer[0].get("role") != "assistant"
        found.append(check_order(answer if is_whole else [*before, *answer], where))
    return found


def check_order(messages: Sequence[object], where: str) -> list[Message]:
    """The messages. Raises LamaError unless their roles are in order and the last one is the assistant's."""
    found: list[Message] = []
    before = ""
    for message in messages:
        if not (
            isinstance(message, dict) and type(message.get("role")) is str and message["role"] in FOLLOWS
        ):
            got = quoted(message, 80)
            raise LamaError(f"a message must have a role among {', '.join(FOLLOWS)}; got {got} in {where}")
        role, content = str(message["role"]), message.get("content")
        calls = role == "assistant" and content is None and message.get("tool_calls")
        if type(content) is not str and not calls:
            raise LamaError(f"a message's content must be a text; got {quoted(content, 80)} in {where}")
        if before not in FOLLOWS[role]:
            after = f"after {before}" if before else "at the beginning"
            rule = "a conversation must be user and assistant in turn, after at most one system message"
            raise LamaError(f"{rule}; got {role} {after} in {where}")
        found.append({name: value for name, value in message.items() if value is not None})
        before = role
    if before != "assistant":
        got = f"got {before} last" if before else "got no messages"
        raise LamaError(f"a conversation must end with the assistant; {got} in {where}")
    return found


def digest_of(corpora: Sequence[Corpus]) -> str:
    """SHA-256 of the content of all files."""
    digest = hashlib.sha256()
    for document in chain.from_iterable(corpus.documents for corpus in corpora):
        with reading(document.name), document.open() as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def encode_conversation(
    row: Row, where: str, tokenizer: Tokenizer, template: ChatTemplate | None, context_length: int
) -> EncodedConversation:
    """A row, cut to `context_length` tokens and one more. Raises LamaError that names the row."""
    return _encoded(messages_of(row, where), where, tokenizer, template, context_length)


def encode_pair(
    row: Row, where: str, tokenizer: Tokenizer, template: ChatTemplate | None, context_length: int
) -> list[EncodedConversation]:
    """A row's conversations with the chosen and the rejected answer, each cut to half of `context_length`.

    The tokens of the first different answer and all after it count in the loss; none if no answer differs.
    Raises LamaError that names the row.
    """
    most = pair_context(context_length)
    sides = [_encoded(each, where, tokenizer, template, most) for each in pair_of(row, where)]
    n = min(len(side.ids) for side in sides)
    differs = sides[0].ids[:n] != sides[1].ids[:n]
    first = int(differs.argmax()) if differs.any() else n
    if first < n and not all(side.counted[first] for side in sides):
        raise LamaError(f"chosen and rejected must follow the same prompt; got other prompts in {where}")
    begin = int(np.flatnonzero(sides[0].counted[:first] == 0).max(initial=-1)) + 1
    # One may be the beginning of the other: the longer answer then continues, if the template ends no turn.
    rest = np.concatenate([side.counted[n : n + 1] for side in sides])
    for side in sides:
        side.counted[: begin if first < n or rest.any() else None] = 0  # equal answers teach nothing
    place = _place_of(sides[0].ids[:begin])
    return [replace(side, place=place) for side in sides]


def pair_context(context_length: int) -> int:
    """The `context_length` of each conversation of a pair: both are in the same row."""
    return context_length // 2


def _place_of(ids: Array) -> float:
    return zlib.crc32(ids.astype("<u4").tobytes()) / 2**32


def _encoded(
    messages: list[Message] | str,
    where: str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    context_length: int,
) -> EncodedConversation:
    if isinstance(messages, str):
        end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        ids = [*tokenizer.encode(messages), *end]
        marks = [True] * len(ids)
    elif template is None:
        rule = "the model must have a chat template to train on messages"
        raise LamaError(f"{rule}; got none for {where}. Use --template plain, or a file")
    else:
        try:
            ids, marks = encode_marked(tokenizer, template, messages)
        except LamaError as error:
            raise LamaError(f"{error} ({where})") from None
    place = _place_of(np.array(ids))
    n = context_length + 1
    counted = np.array(marks[:n], np.uint8)
    counted[:1] = 0  # nothing predicts the first token
    return EncodedConversation(np.array(ids[:n], dtype_of(tokenizer)), counted, place, len(ids) > n)


def write_conversations(
    corpus: Corpus,
    held_out: Corpus | None,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    folder: Path,
    context_length: int,
    validation: float,
    progress: Progress = iter,
    pairs: bool = False,
) -> TokenFiles:
    """Write conversations as `tokenize` writes a corpus, and also which tokens count in the loss.

    They are cut as in `encode_conversation`, and dropped if no token of the assistant is left. The held-out
    part is `held_out`, else about the share `validation`, at least one conversation. With `pairs`, the two
    conversations of `encode_pair` are adjacent; pairs with equal answers are dropped. Raises LamaError for
    wrong rows, and if a part has no conversation.
    """
    notes = {"conversations": 0, "cut": 0, "dropped": 0} | ({"same": 0} if pairs else {})

    def read(source: Corpus) -> list[list[EncodedConversation]]:
        rows = (
            (row, f"line {number} of {quoted_path(document.name)}")
            for document in source.documents
            for number, row in rows_of(document.name, document.open, (*COLUMNS, *ANSWERS))
        )
        found = []
        for row, where in progress(rows):
            about = where, tokenizer, template, context_length
            each = encode_pair(row, *about) if pairs else [encode_conversation(row, *about)]
            notes["conversations"] += 1
            is_cut = any(side.is_cut for side in each)
            if not all(side.counted.any() for side in each):
                notes["dropped" if is_cut or not pairs else "same"] += 1
                continue
            notes["cut"] += is_cut
            found.append(each)
        return found

    train = read(corpus)
    if held_out is None:
        places = sorted(each[0].place for each in train)
        limit = places[max(1, round(validation * len(places))) - 1] if places else 0.0
        parts = (
            [each for each in train if each[0].place > limit],
            [each for each in train if each[0].place <= limit],
        )
    else:
        parts = train, read(held_out)
    if not all(parts):
        got = f"got {len(parts[0])} and {len(parts[1])} of {notes['conversations']} in {corpus.name}"
        most = pair_context(context_length) if pairs else context_length
        dropped = f", {notes['dropped']} without a token of the assistant in {most + 1}"
        same = f", {same} without two different answers" if (same := notes.get("same")) else ""
        rule = "there must be training conversations and held-out ones"
        raise LamaError(
            f"{rule}; {got}{dropped if notes['dropped'] else ''}{same}. Add more, or --chat-held-out FILE"
        )
    sizes = []
    with closing(TokenWriter(folder, tokenizer, counted=True)) as writer:
        for part, conversations in zip(PARTS, parts, strict=True):
            size = 0
            for each in chain.from_iterable(conversations):
                writer.add(part, each.ids, each.counted)
                size += len(tokenizer.decode_bytes(each.ids[each.counted > 0].tolist()))
            sizes.append(size)
        meta = {"bytes": dict(zip(PARTS, sizes, strict=True)), "notes": notes}
        writer.finish(corpus, digest_of([corpus, *([] if held_out is None else [held_out])]), meta)
    return open_tokens(folder)
