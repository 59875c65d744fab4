"""Parse the tokens that a model may answer with."""

from lama.errors import LamaError
from lama.interp.labels import token_labels
from lama.tokenizers import Tokenizer, encode_inside


def single_token(tokenizer: Tokenizer, text: str) -> int:
    """The token that spells this text or, if that takes several tokens, the one that spells ` text`.

    Raises LamaError, naming the tokens of the text, if neither is one token.
    """
    if not text:
        raise LamaError("an answer must be one token; got nothing")
    ids = encode_inside(tokenizer, text)
    if len(ids) > 1 and (spaced := with_space(tokenizer, text)) is not None:
        return spaced
    if len(ids) != 1:
        labels = " ".join(token_labels(tokenizer, ids))
        raise LamaError(f"an answer must be one token; got {text!r}, which is {len(ids)}: {labels}")
    return ids[0]


def with_space(tokenizer: Tokenizer, text: str) -> int | None:
    """The one token that spells ` text`, or None."""
    try:
        ids = encode_inside(tokenizer, f" {text}")
    except LamaError:  # a vocabulary without spaces
        return None
    return ids[0] if len(ids) == 1 else None
