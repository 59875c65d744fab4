"""The token ids that a model reads for a text, whatever its kind."""

import re
from typing import Any

from lama.data.masked import MASK
from lama.data.pairs import encode_source
from lama.errors import LamaError, quoted
from lama.models.registry import kind_of
from lama.tokenizers import BytePairTokenizer, Tokenizer, WordPieceTokenizer


def input_tokens(model: Any, tokenizer: Any, text: str) -> list[int]:
    """The ids that the model reads for a text; for an encoder-decoder, the text is a source.

    Raises LamaError for a text that is empty, cannot be spelled, has tokens that the model lacks, or exceeds
    its context.
    """
    if not text:
        raise LamaError("the text must not be empty; got nothing. Give some text")
    match kind_of(model):
        case "transformer":
            ids = encode_source(text, tokenizer)
        case "bert":
            ids = masked_input(tokenizer, text)
        case "classifier":
            ids = classifier_input(tokenizer, text)
        case _:
            ids = tokenizer.encode(text)
    return check_length(check_tokens(tokenizer, ids, model.config.vocab_size), model.config.context_length)


def check_tokens(tokenizer: Tokenizer, ids: list[int], vocab_size: int) -> list[int]:
    """The ids, if all are below `vocab_size`. Raises LamaError that names the first other token."""
    if max(ids, default=0) >= vocab_size:
        token = next(i for i in ids if i >= vocab_size)
        sizes = f"vocab_size={vocab_size}, and the tokenizer has {tokenizer.vocab_size} tokens"
        shown = quoted(tokenizer.decode([token]))
        raise LamaError(f"the text must be made of the model's tokens; got {shown}, id {token} ({sizes})")
    return ids


def check_length(ids: list[int], context_length: int) -> list[int]:
    """The ids, if they fit the context. Raises LamaError."""
    if len(ids) > context_length:
        sizes = f"{len(ids)} tokens, context_length={context_length}"
        raise LamaError(f"the text must fit context_length; got {sizes}. Shorten it")
    return ids


def masked_input(tokenizer: BytePairTokenizer | WordPieceTokenizer, text: str) -> list[int]:
    """The ids of a text for BERT; the space before a [MASK] belongs to the hidden token."""
    if isinstance(tokenizer, WordPieceTokenizer):
        return tokenizer.framed(text)
    return tokenizer.encode(re.sub(r"\s+" + re.escape(MASK), MASK, text))


def classifier_input(tokenizer: BytePairTokenizer, text: str) -> list[int]:
    """The ids of a text for a classifier: [MASK] is plain text, and the first word also follows a space."""
    return tokenizer.encode_ordinary(f" {text.strip()}")
