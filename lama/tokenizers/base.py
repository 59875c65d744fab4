"""The interface of every tokenizer, shared parts of tokenizers, and decoding token by token."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from lama.errors import LamaError
from lama.tokenizers.special import AddedToken

WHITE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode's White_Space; Python's own has U+001C to U+001F as well."""
Frame: TypeAlias = tuple[Sequence[int], Sequence[int]]  # the ids before and after a whole text


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Ids run from 0 to vocab_size - 1; some may be unused."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, if the vocabulary has one."""

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text. Raises LamaError for unknown characters and lone surrogates."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 of the text, which may end inside a character. Raises LamaError for unknown ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""

    def to_json(self) -> dict[str, object]:
        """The spec from which `tokenizer_from_json` and the files of `save` rebuild this tokenizer."""

    def save(self, folder: Path) -> None:
        """Write the files that belong with `to_json`, if any, into `folder`."""


def to_utf8(text: str) -> bytes:
    """Encode as UTF-8. Raises LamaError for lone surrogates, which stand for bytes that were not UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        got = f"got {text[error.start]!r} at character {error.start}. Is it saved as UTF-8?"
        raise LamaError(f"text must be valid Unicode; {got}") from None


def unknown_id(token: int, vocab_size: int) -> LamaError:
    got = f"got id={token}, vocab_size={vocab_size}"
    return LamaError(f"token ids must be in the tokenizer's vocabulary; {got}")


def joined(entries: Sequence[str], ids: Iterable[int]) -> bytes:
    """The UTF-8 of tokens that are entries of a vocabulary. Raises LamaError for unknown ids."""
    ids = list(ids)
    if unknown := [i for i in ids if not 0 <= i < len(entries)]:
        raise unknown_id(unknown[0], len(entries))
    return "".join([entries[i] for i in ids]).encode()


class PlainTokenizer:
    """The shared part of tokenizers; by default there are no files to save."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write nothing."""


@dataclass(frozen=True)
class Common:
    """The arguments that byte-pair encoding and WordPiece share."""

    end_of_text: int | None = None
    frame: Frame = ((), ())
    """The ids before and after a whole text."""
    spec: Mapping[str, object] = field(default_factory=dict)
    """The result of `to_json`."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The files that `save` writes."""


class TableTokenizer(PlainTokenizer):
    """The shared part of byte-pair encoding and WordPiece. A subclass finds the ids of a text in `_ids`."""

    added: Sequence[AddedToken] = ()
    """The tokens that are recognised by their exact text."""

    def __init__(self, table: Mapping[int, bytes], common: Common):
        """`table` maps each id to its bytes."""
        self.end_of_text = common.end_of_text
        self.frame = common.frame
        self.files = common.files
        self.vocab_size = max(table) + 1
        self._bytes = table
        self._spec = common.spec

    def _ids(self, text: str, added: bool) -> list[int]:
        """The ids of valid Unicode, without the frame. `added`: whether to recognise added tokens."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, with its frame; the text of an added token becomes that token."""
        return [*self.frame[0], *self.encode_inside(text), *self.frame[1]]

    def encode_inside(self, text: str, added: bool = True) -> list[int]:
        """The ids without the frame; without `added`, the text of an added token is ordinary text."""
        to_utf8(text)
        return self._ids(text, added)

    def encode_ordinary(self, text: str) -> list[int]:
        """Like `encode`, but an added token's text is ordinary text: for text that is not trusted."""
        return [*self.frame[0], *self.encode_inside(text, False), *self.frame[1]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; an unused id has none. Raises LamaError for ids from vocab_size on."""
        ids = list(ids)
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError:
            if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
                raise unknown_id(unknown[0], self.vocab_size) from None
            return b"".join([self._bytes.get(i, b"") for i in ids])

    def to_json(self) -> dict[str, object]:
        return dict(self._spec)

    def save(self, folder: Path) -> None:
        """Write the files that the tokenizer was read from, if any, into `folder`."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def encode_inside(tokenizer: Tokenizer, text: str, added: bool = True) -> list[int]:
    """The ids of a text inside another text, without a frame. Raises LamaError as `encode` does.

    Without `added`, the text of an added token is ordinary text.
    """
    if isinstance(tokenizer, TableTokenizer):
        return tokenizer.encode_inside(text, added)
    return tokenizer.encode(text)


class StreamDecoder:
    """Decode token by token. A character is held back until all of its bytes have arrived.

    The pieces, with `flush()` at the end, are exactly `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; often a word, sometimes nothing."""
        return self._decoder.decode(self.tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """Return "", or U+FFFD for an incomplete character at the end. Ready for the next text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
