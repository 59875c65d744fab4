"""The two tokenizers that need no vocabulary file: bytes, and the characters of a corpus."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lama.errors import LamaError
from lama.tokenizers.base import to_utf8, unknown_id


class ByteTokenizer:
    """One token for each byte of UTF-8: 256 ids, and any text can be spelled. `encode("é")` is `[195, 169]`."""

    vocab_size = 256
    end_of_text = None

    def encode(self, text: str) -> list[int]:
        return list(to_utf8(text))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        try:
            return bytes(ids)
        except ValueError:
            raise unknown_id(next(i for i in ids if not 0 <= i < 256), self.vocab_size) from None

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class CharacterTokenizer:
    """One token for each distinct character of `characters`, in code point order. A corpus will do as `characters`."""

    end_of_text = None

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise LamaError("a character tokenizer must know at least one character; got an empty text")
        to_utf8(self.characters)
        self.vocab_size = len(self.characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        to_utf8(text)
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            known = f"{self.characters[:60]!r}{'...' if self.vocab_size > 60 else ''}"
            raise LamaError(
                f"text must be made of the model's {self.vocab_size} characters {known}; "
                f"got {character!r} at character {text.index(character)}"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise unknown_id(unknown[0], self.vocab_size)
        return "".join(self.characters[i] for i in ids).encode()

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "character", "characters": self.characters}

    def save(self, folder: Path) -> None:
        """Nothing to write."""
