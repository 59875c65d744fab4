"""BERT's WordPiece: words and punctuation, then the longest pieces of them that the vocabulary has.

Source: google-research/bert, tokenization.py.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lama.errors import LamaError
from lama.tokenizers.base import to_utf8, unknown_id

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100  # characters; a longer one is unknown
# Chinese characters are words of their own.
IDEOGRAPHS = (
    "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002f800-\U0002fa1f"
)


class WordPieceTokenizer:
    """One id a line of `vocabulary`, in which `##ing` continues a word. `encode("Unaffable.")` is un, ##aff, ##able, ".".

    With `lower_case`, text is lowered and loses its accents. In `decode` every word has a space before it.
    """

    end_of_text = None

    def __init__(self, vocabulary: list[str], lower_case: bool = True):
        """Raises LamaError for a vocabulary without [PAD], [UNK], [CLS], [SEP] and [MASK]."""
        self.vocabulary, self.lower_case, self.vocab_size = vocabulary, lower_case, len(vocabulary)
        self._ids = {token: i for i, token in enumerate(vocabulary)}
        if missing := [token for token in SPECIAL if token not in self._ids]:
            raise LamaError(f"a WordPiece vocabulary must have {', '.join(SPECIAL)}; got none of {', '.join(missing)}")
        self._pieces = functools.lru_cache(1 << 16)(self._split_word)

    def encode(self, text: str) -> list[int]:
        return [i for word in self.words(text) for i in ([self._ids[word]] if word in SPECIAL else self._pieces(word))]

    def encode_ordinary(self, text: str) -> list[int]:
        """Like `encode`, but what the text says of [MASK] is read as text."""
        return [i for word in self._words(to_utf8(text).decode()) for i in self._pieces(word)]

    def framed(self, text: str) -> list[int]:
        """[CLS] text [SEP]: what BERT was trained on."""
        return [self._ids["[CLS]"], *self.encode(text), self._ids["[SEP]"]]

    def words(self, text: str) -> list[str]:
        """Special tokens, words and single punctuation marks. Raises LamaError for lone surrogates."""
        to_utf8(text)
        parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
        return [word for i, part in enumerate(parts) for word in ([part] if i % 2 else self._words(part))]

    def _words(self, text: str) -> list[str]:
        text = "".join(" " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else c for c in text if not _is_control(c))
        text = re.sub(f"([{IDEOGRAPHS}])", r" \1 ", text)
        if self.lower_case:
            text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if _is_punctuation(c) else c for c in text).split()

    def _split_word(self, word: str) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(word) <= LONGEST_WORD:
            prefix = "##" if start else ""
            end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in self._ids), None)
            if end is None:
                return [self._ids["[UNK]"]]
            ids.append(self._ids[prefix + word[start:end]])
            start = end
        return ids if len(word) <= LONGEST_WORD else [self._ids["[UNK]"]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise unknown_id(unknown[0], self.vocab_size)
        tokens = [self.vocabulary[i] for i in ids]
        return "".join(token.removeprefix("##") if token.startswith("##") else f" {token}" for token in tokens).encode()

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "wordpiece", "lower_case": self.lower_case}

    def save(self, folder: Path) -> None:
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self.vocabulary), encoding="utf-8", newline="\n")


def read_vocabulary(path: Path) -> list[str]:
    """The lines of a vocab.txt. Raises LamaError."""
    try:
        return path.read_bytes().decode().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LamaError(f"a WordPiece vocabulary must be a UTF-8 file; got {error} for {path}") from None


def load_wordpiece_tokenizer(folder: Path) -> WordPieceTokenizer:
    """The tokenizer in a BERT's folder: vocab.txt or tokenizer.json, and in tokenizer_config.json whether it lowers. Raises LamaError."""
    settings = _json(folder / "tokenizer_config.json")
    if (folder / "vocab.txt").exists():
        return WordPieceTokenizer(read_vocabulary(folder / "vocab.txt"), settings.get("do_lower_case") is not False)
    spec = _json(folder / "tokenizer.json")
    model = spec.get("model") or {}
    if model.get("type") != "WordPiece" or not isinstance(model.get("vocab"), dict):
        raise LamaError(f"a BERT must have its vocab.txt, or a WordPiece tokenizer.json, beside it; got neither in {folder}")
    lower = (spec.get("normalizer") or {}).get("lowercase", settings.get("do_lower_case", True))
    return WordPieceTokenizer(sorted(model["vocab"], key=model["vocab"].__getitem__), bool(lower))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise LamaError(f"{path} must be JSON; got {error}") from None
    return value if isinstance(value, dict) else {}


def _is_control(c: str) -> bool:
    return c in "\0\ufffd" or (c not in "\t\n\r" and unicodedata.category(c).startswith("C"))


def _is_punctuation(c: str) -> bool:
    """Unicode's, and all of ASCII that is neither letter, digit nor space, `$` and `^` too."""
    return 33 <= ord(c) <= 47 or 58 <= ord(c) <= 64 or 91 <= ord(c) <= 96 or 123 <= ord(c) <= 126 or unicodedata.category(c).startswith("P")
