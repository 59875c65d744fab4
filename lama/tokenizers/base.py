"""What every tokenizer can do, and text that streams out of one token by token."""

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lama.errors import LamaError


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Ids run from 0 to vocab_size - 1; some may be unused."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, where the vocabulary has one."""

    def encode(self, text: str) -> list[int]:
        """Raises LamaError for text that the vocabulary cannot spell, and for lone surrogates."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 of the text; part of a character where `ids` ends inside one. Raises LamaError for unknown ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""

    def to_json(self) -> dict[str, Any]:
        """What `tokenizer_from_json` needs to make this tokenizer again, beside the files of `save`."""

    def save(self, folder: Path) -> None:
        """Write the files that belong with `to_json`, if any, into `folder`."""


def to_utf8(text: str) -> bytes:
    """Raises LamaError for lone surrogates: Python's placeholder for bytes that were not UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise LamaError(
            f"text must be valid Unicode; got {text[error.start]!r} at character {error.start}. Is it saved as UTF-8?"
        ) from None


def unknown_id(token: int, vocab_size: int) -> LamaError:
    return LamaError(f"token ids must be in the tokenizer's vocabulary; got id={token}, vocab_size={vocab_size}")


class StreamDecoder:
    """Text from tokens as they come; a character is held back until all of its bytes are there.

    The pieces, with `flush()` at the end, make exactly `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; often a word, sometimes nothing."""
        return self._decoder.decode(self.tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: "" or U+FFFD for a character that never became whole. Ready for the next text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
