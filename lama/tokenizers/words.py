"""Two tokenizers for pairs of sentences: the words of a corpus, and special tokens put before another's vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lama.errors import LamaError, quoted
from lama.tokenizers.base import Tokenizer, to_utf8, unknown_id

# A word with the space before it, a digit, any other single character: joined, they are the text.
PIECES = re.compile(r" ?[^\W\d_]+|\s|\d|[^\w\s]|_")


class WordTokenizer:
    """One token for each of `entries`, words or characters; a word that is not among them is spelled in characters.

    `WordTokenizer.of(["two hundred", "two"])` knows "two", " hundred" and every single character of them.
    """

    end_of_text = None

    def __init__(self, entries: Sequence[str]):
        self.entries = list(entries)
        self.vocab_size = len(self.entries)
        self._ids = {entry: i for i, entry in enumerate(self.entries)}
        if not self.entries or len(self._ids) < len(self.entries):
            raise LamaError(f"a word tokenizer's entries must be at least one, each once; got {quoted(self.entries)}")
        to_utf8("".join(self.entries))

    @classmethod
    def of(cls, texts: Iterable[str], least: int = 2, most: int = 8000) -> "WordTokenizer":
        """All characters of `texts`, then the words that occur at least `least` times, the commonest first, up to `most` of them."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(PIECES.findall(text))
        characters = sorted({character for piece in counts for character in piece})
        words = sorted((piece for piece, n in counts.items() if n >= least and len(piece) > 1), key=lambda piece: (-counts[piece], piece))
        return cls(characters + words[:most])

    def encode(self, text: str) -> list[int]:
        to_utf8(text)
        ids: list[int] = []
        for piece in PIECES.findall(text):
            if piece in self._ids:
                ids.append(self._ids[piece])
                continue
            for character in piece:
                if character not in self._ids:
                    raise LamaError(f"text must be made of characters that the model has seen; got {character!r} in {text[:60]!r}")
                ids.append(self._ids[character])
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise unknown_id(unknown[0], self.vocab_size)
        return "".join(self.entries[i] for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "words", "entries": self.entries}

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class PairTokenizer:
    """Another tokenizer's ids, moved up to make room for three: 0 fills rows up, 1 begins a target, 2 ends a source and a target."""

    pad, begin, end = 0, 1, 2
    first = 3
    """The id of the other tokenizer's 0."""

    def __init__(self, tokenizer: Tokenizer):
        self.inner = tokenizer
        self.vocab_size = tokenizer.vocab_size + self.first
        self.end_of_text = self.end

    def encode(self, text: str) -> list[int]:
        return [token + self.first for token in self.inner.encode(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text up to the first `end`, without the other special tokens."""
        inner = []
        for token in ids:
            if token == self.end:
                break
            if token >= self.first:
                inner.append(token - self.first)
            elif token < 0:
                raise unknown_id(token, self.vocab_size)
        return self.inner.decode_bytes(inner)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "pairs", "tokenizer": self.inner.to_json()}

    def save(self, folder: Path) -> None:
        self.inner.save(folder)
