"""The interface of every tokenizer, the common part of those with a vocabulary, and text that streams out token by token."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lama.errors import LamaError

WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space; Python's own has U+001C to U+001F as well."""
Frame = tuple[Sequence[int], Sequence[int]]  # the ids before and after a whole text


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Ids run from 0 to vocab_size - 1; some may be unused."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, where the vocabulary has one."""

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text. Raises LamaError for text that the vocabulary cannot spell, and for lone surrogates."""

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


class TableTokenizer:
    """The common part of byte-pair encoding and WordPiece: a table of tokens, and ids that frame a text.

    `table` gives the bytes of each id. `frame` holds the ids before and after a whole text, such as a token that begins
    every text. `spec` and `files` are what `to_json` and `save` give. A subclass finds the ids in `_ids`.
    """

    def __init__(
        self,
        table: Mapping[int, bytes],
        end_of_text: int | None,
        frame: Frame = ((), ()),
        spec: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ):
        self.end_of_text, self.frame, self.files = end_of_text, frame, files or {}
        self._bytes, self._spec = table, spec or {}
        self.vocab_size = max(table) + 1

    def _ids(self, text: str, added: bool) -> list[int]:
        """The ids of valid Unicode without the frame; added tokens are recognised only where `added` is true."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, with its frame; the text of an added token is that token."""
        return [*self.frame[0], *self.encode_inside(text), *self.frame[1]]

    def encode_inside(self, text: str) -> list[int]:
        """The ids without the frame."""
        to_utf8(text)
        return self._ids(text, True)

    def encode_ordinary(self, text: str) -> list[int]:
        """Like `encode`, but the text of an added token is text: right for text that is not trusted."""
        to_utf8(text)
        return [*self.frame[0], *self._ids(text, False), *self.frame[1]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; an id below vocab_size without a token has none. Raises LamaError for other ids."""
        ids = list(ids)
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError:
            if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
                raise unknown_id(unknown[0], self.vocab_size) from None
            return b"".join([self._bytes.get(i, b"") for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return dict(self._spec)

    def save(self, folder: Path) -> None:
        """Write the files that the tokenizer was read from, where there were any, below `folder`."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that stands inside another: without those that frame a whole text. Raises LamaError as `encode`."""
    return tokenizer.encode_inside(text) if isinstance(tokenizer, TableTokenizer) else tokenizer.encode(text)


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
