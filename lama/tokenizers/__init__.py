"""Text to token ids and back: bytes, characters, GPT-2's BPE, a BPE of your own text, Hugging Face's BPE folders, BERT's WordPiece."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lama.errors import LamaError, quoted
from lama.files import quoted_path, read_file
from lama.tokenizers.base import StreamDecoder, Tokenizer, encode_inside
from lama.tokenizers.basic import ByteTokenizer, CharacterTokenizer
from lama.tokenizers.bpe import BytePairTokenizer, gpt2_tokenizer
from lama.tokenizers.export import huggingface_files
from lama.tokenizers.huggingface import SAVED_IN, load_huggingface_tokenizer, load_saved_tokenizer, load_wordpiece_tokenizer
from lama.tokenizers.training import train_bpe
from lama.tokenizers.wordpiece import WordPieceTokenizer, text_lines
from lama.tokenizers.words import PairTokenizer, WordTokenizer

KINDS = ("bytes", "character", "words", "gpt2", "huggingface", "wordpiece", "pairs")


def tokenizer_from_json(spec: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer whose `to_json` was `spec` and whose `save` wrote into `folder`. Raises LamaError."""
    match spec:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "character", "characters": str(characters)}:
            if list(characters) != sorted(set(characters)):
                raise LamaError(f"a tokenizer's characters must be distinct and in code point order; got {quoted(characters)}")
            return CharacterTokenizer(characters)
        case {"kind": "words", "entries": [*entries]} if all(isinstance(entry, str) and entry for entry in entries):
            return WordTokenizer(entries)
        case {"kind": "pairs", "tokenizer": dict(inner)}:
            return PairTokenizer(tokenizer_from_json(inner, folder))
        case {"kind": "gpt2"}:
            return gpt2_tokenizer()
        case {"kind": "huggingface"} if isinstance(spec.get("class"), str | None):
            return load_saved_tokenizer(Path(folder) / SAVED_IN, spec.get("class"))
        case {"kind": "wordpiece", "lower_case": bool(lower_case)}:
            path = Path(folder) / "vocab.txt"
            return WordPieceTokenizer(text_lines(read_file(path), quoted_path(path)), lower_case)
    raise LamaError(f"a tokenizer's kind must be one of {', '.join(KINDS)}; got {quoted(dict(spec))}")


__all__ = [
    "BytePairTokenizer",
    "ByteTokenizer",
    "CharacterTokenizer",
    "PairTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WordPieceTokenizer",
    "WordTokenizer",
    "encode_inside",
    "gpt2_tokenizer",
    "huggingface_files",
    "load_huggingface_tokenizer",
    "load_wordpiece_tokenizer",
    "tokenizer_from_json",
    "train_bpe",
]
