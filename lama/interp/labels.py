"""Readable labels of tokens, also of white space and of parts of characters."""

from collections.abc import Iterable
from typing import SupportsInt

from lama.errors import printable
from lama.tokenizers import PairTokenizer, Tokenizer, WordPieceTokenizer

VISIBLE = str.maketrans(" \n\t", "·↵⇥")
PAIR_LABELS = {PairTokenizer.pad: "<pad>", PairTokenizer.begin: "<begin>", PairTokenizer.end: "<end>"}


def token_labels(tokenizer: Tokenizer, ids: Iterable[SupportsInt]) -> list[str]:
    """A label for each token: `·the` for ` the`, `↵` for a line break, `\\xc3` for the first byte of `é`.

    WordPiece tokens keep their spelling. An id without a token is shown as `<50300>`.
    """
    return [_label(tokenizer, int(token)) or f"<{int(token)}>" for token in ids]


def _label(tokenizer: Tokenizer, token: int) -> str:
    if isinstance(tokenizer, PairTokenizer):
        return PAIR_LABELS.get(token) or _label(tokenizer.inner, token - tokenizer.first)
    if isinstance(tokenizer, WordPieceTokenizer) and token in tokenizer.vocabulary:
        return tokenizer.vocabulary[token]
    if token >= tokenizer.vocab_size:
        return ""
    text = tokenizer.decode_bytes([token]).decode(errors="backslashreplace")
    return printable(text.translate(VISIBLE))
