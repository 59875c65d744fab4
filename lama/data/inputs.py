"""What a model reads of a text, whatever its kind."""

import re
from typing import Any

from lama.data.masked import MASK
from lama.data.pairs import encode_source
from lama.errors import LamaError
from lama.models.kinds import kind_of
from lama.tokenizers import BytePairTokenizer, WordPieceTokenizer


def input_tokens(model: Any, tokenizer: Any, text: str) -> list[int]:
    """The ids that the model is given for a text; of an encoder-decoder, for a source.

    Raises LamaError for text that cannot be spelled, for none, and for more than the model's context.
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
    return check_length(ids, model.config.context_length)


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
