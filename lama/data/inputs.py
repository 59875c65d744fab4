"""What a model reads of a text, whatever its kind."""

import re
from typing import Any

from lama.data.masked import MASK
from lama.data.pairs import encode_source
from lama.errors import LamaError, quoted
from lama.models.kinds import kind_of
from lama.tokenizers import BytePairTokenizer, Tokenizer, WordPieceTokenizer


def input_tokens(model: Any, tokenizer: Any, text: str) -> list[int]:
    """The ids that the model is given for a text; of an encoder-decoder, for a source.

    Raises LamaError for text that cannot be spelled, for none, for tokens that the model lacks, and for more than its context.
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
    """The ids, if a model of `vocab_size` rows has them all: a tokenizer may be larger. Raises LamaError that names the first other."""
    if max(ids, default=0) >= vocab_size:
        token = next(i for i in ids if i >= vocab_size)
        sizes = f"vocab_size={vocab_size}, and the tokenizer has {tokenizer.vocab_size} tokens"
        raise LamaError(f"the text must be made of the model's tokens; got {quoted(tokenizer.decode([token]))}, id {token} ({sizes})")
    return ids


def check_length(ids: list[int], context_length: int) -> list[int]:
    """The ids, if a model of that context can read them. Raises LamaError."""
    if len(ids) > context_length:
        raise LamaError(f"the text must fit context_length; got {len(ids)} tokens, context_length={context_length}. Shorten it")
    return ids


def masked_input(tokenizer: BytePairTokenizer | WordPieceTokenizer, text: str) -> list[int]:
    """A text for BERT, [MASK] being the token; the space before one is the hidden token's own, as it is of a word."""
    if isinstance(tokenizer, WordPieceTokenizer):
        return tokenizer.framed(text)
    return tokenizer.encode(re.sub(r"\s+" + re.escape(MASK), MASK, text))


def classifier_input(tokenizer: BytePairTokenizer, text: str) -> list[int]:
    """A text for a classifier; what it says of [MASK] is read as text. A word at its start is the token that it is elsewhere."""
    return tokenizer.encode_ordinary(f" {text.strip()}")
