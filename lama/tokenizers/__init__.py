"""Text to token ids and back: bytes, characters, words, BPE (GPT-2's, trained, Hugging Face's), WordPiece."""

from collections.abc import Mapping
from pathlib import Path

from lama.errors import LamaError, quoted
from lama.files import field, quoted_path, read_file
from lama.tokenizers.base import StreamDecoder, Tokenizer, encode_inside
from lama.tokenizers.basic import ByteTokenizer, CharacterTokenizer
from lama.tokenizers.bpe import BytePairTokenizer, gpt2_tokenizer
from lama.tokenizers.export import huggingface_files
from lama.tokenizers.huggingface import (
    SAVED_IN,
    load_huggingface_tokenizer,
    load_wordpiece_tokenizer,
    tokenizer_files,
    tokenizer_of_files,
)
from lama.tokenizers.training import train_bpe
from lama.tokenizers.wordpiece import WordPieceTokenizer, text_lines
from lama.tokenizers.words import PairTokenizer, WordTokenizer

TOKENIZER_KINDS = ("bytes", "character", "words", "gpt2", "huggingface", "wordpiece", "pairs")


def tokenizer_from_json(spec: Mapping[str, object], folder: Path) -> Tokenizer:
    """Rebuild a tokenizer from its `to_json` and the folder that its `save` wrote. Raises LamaError."""
    match spec:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "character", "characters": str(characters)}:
            if list(characters) != sorted(set(characters)):
                rule = "be distinct and in code point order"
                raise LamaError(f"a tokenizer's characters must {rule}; got {quoted(characters)}")
            return CharacterTokenizer(characters)
        case {"kind": "words", "entries": [*entries]} if all(
            each and isinstance(each, str) for each in entries
        ):
            return WordTokenizer([str(each) for each in entries])
        case {"kind": "pairs", "tokenizer": dict(inner)}:
            return PairTokenizer(tokenizer_from_json(inner, folder))
        case {"kind": "gpt2"}:
            return gpt2_tokenizer()
        case {"kind": "huggingface"}:
            of_class = field(spec, "class", str, "a tokenizer's spec", None)
            saved = Path(folder) / SAVED_IN
            return tokenizer_of_files(tokenizer_files(saved), saved, of_class)
        case {"kind": "wordpiece", "lower_case": bool(lower_case)}:
            path = Path(folder) / "vocab.txt"
            return WordPieceTokenizer(text_lines(read_file(path), quoted_path(path)), lower_case)
    kinds = ", ".join(TOKENIZER_KINDS)
    raise LamaError(f"a tokenizer's kind must be one of {kinds}; got {quoted(dict(spec))}")


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
