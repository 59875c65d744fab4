"""The two tokenizers that need no vocabulary file: bytes, and the characters of a corpus."""

from collections.abc import Iterable

from lama.errors import LamaError
from lama.tokenizers.base import PlainTokenizer, joined, to_utf8, unknown_id


class ByteTokenizer(PlainTokenizer):
    """One token for each byte of UTF-8: 256 ids, for any text. `encode("é")` is `[195, 169]`."""

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

    def to_json(self) -> dict[str, object]:
        return {"kind": "bytes"}


class CharacterTokenizer(PlainTokenizer):
    """One token for each distinct character of `characters`, such as a corpus, in code point order."""

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
            got = f"got {character!r} at character {text.index(character)}"
            rule = f"be made of the model's {self.vocab_size} characters {known}"
            raise LamaError(f"text must {rule}; {got}") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return joined(self.characters, ids)

    def to_json(self) -> dict[str, object]:
        return {"kind": "character", "characters": self.characters}
