"""Tokens as labels: each readable for itself, white space and half characters too."""

from collections.abc import Iterable
from typing import SupportsInt

from lama.tokenizers import PairTokenizer, Tokenizer, WordPieceTokenizer

VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥"}
PAIR_LABELS = {PairTokenizer.pad: "<pad>", PairTokenizer.begin: "<begin>", PairTokenizer.end: "<end>"}


def token_labels(tokenizer: Tokenizer, ids: Iterable[SupportsInt]) -> list[str]:
    """A label for each token: ` the` is `·the`, a line's end `↵`, the first byte of `é` `\\xc3`; WordPiece's as its vocabulary has them.

    A row of the model that the tokenizer has no token for is called by its id, `<50300>`.
    """
    return [_label(tokenizer, int(token)) or f"<{int(token)}>" for token in ids]


def _label(tokenizer: Tokenizer, token: int) -> str:
    if isinstance(tokenizer, PairTokenizer):
        return PAIR_LABELS[token] if token in PAIR_LABELS else _label(tokenizer.inner, token - tokenizer.first)
    if isinstance(tokenizer, WordPieceTokenizer) and token in tokenizer.vocabulary:
        return tokenizer.vocabulary[token]
    if token >= tokenizer.vocab_size:
        return ""
    text = tokenizer.decode_bytes([token]).decode(errors="backslashreplace")
    return "".join(VISIBLE.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in text)
