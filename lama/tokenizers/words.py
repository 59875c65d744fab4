"""Tokenizers for pairs of sentences: the words of a corpus, and special tokens before a vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lama.errors import LamaError, quoted
from lama.tokenizers.base import PlainTokenizer, Tokenizer, joined, to_utf8, unknown_id

# A word with the space before it, a digit, or another single character: joined, they are the text.
PIECES = re.compile(r" ?[^\W\d_]+|\s|\d|[^\w\s]|_")


class WordTokenizer(PlainTokenizer):
    """One token for each of `entries`, words or characters; other words are spelled in characters.

    `WordTokenizer.of(["two hundred", "two"])` knows "two", " hundred" and every character of them.
    """

    end_of_text = None

    def __init__(self, entries: Sequence[str]):
        self.entries = list(entries)
        self.vocab_size = len(self.entries)
        self._ids = {entry: i for i, entry in enumerate(self.entries)}
        if not self.entries or len(self._ids) < len(self.entries):
            got = f"got {quoted(self.entries)}"
            raise LamaError(f"a word tokenizer's entries must be at least one, each once; {got}")
        to_utf8("".join(self.entries))

    @classmethod
    def of(cls, texts: Iterable[str], least: int = 2, most: int = 8000) -> "WordTokenizer":
        """Learn the characters of `texts`, and up to `most` words that occur at least `least` times."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(PIECES.findall(text))
        characters = sorted({character for piece in counts for character in piece})
        words = [piece for piece, n in counts.items() if n >= least and len(piece) > 1]
        words.sort(key=lambda piece: (-counts[piece], piece))
        return cls(characters + words[:most])

    def encode(self, text: str) -> list[int]:
        to_utf8(text)
        ids: list[int] = []
        for piece in PIECES.findall(text):
            for entry in [piece] if piece in self._ids else piece:
                if entry not in self._ids:
                    got = f"got {entry!r} in {text[:60]!r}"
                    raise LamaError(f"text must be made of characters that the model has seen; {got}")
                ids.append(self._ids[entry])
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return joined(self.entries, ids)

    def to_json(self) -> dict[str, object]:
        return {"kind": "words", "entries": self.entries}


class PairTokenizer(PlainTokenizer):
    """Another tokenizer's ids, with three special tokens before them.

    0 pads rows, 1 begins a target, 2 ends a source and a target.
    """

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

    def to_json(self) -> dict[str, object]:
        return {"kind": "pairs", "tokenizer": self.inner.to_json()}

    def save(self, folder: Path) -> None:
        self.inner.save(folder)
