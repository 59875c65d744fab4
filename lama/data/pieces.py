"""The token ids of a text that is read in pieces, equal to those of the whole text."""

from collections.abc import Iterable, Iterator

from lama.data.corpora import last_boundary
from lama.tokenizers import Tokenizer, encode_inside
from lama.tokenizers.base import WHITE, TableTokenizer

AHEAD = 1 << 15  # characters after a cut whose tokens are compared; no added token is so long
CUTS = 64  # positions that are tried before more text is read


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """The ids of `tokenizer.encode` for a text in pieces, as lists in order.

    A list ends at a cut after which, for `AHEAD` characters, the text has the same ids with and without the
    text before it. Raises LamaError for text that cannot be spelled.
    """
    before, after = frame_of(tokenizer)
    yield before
    yield from encode_inside_pieces(tokenizer, pieces)
    yield after


def frame_of(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after a whole text."""
    before, after = tokenizer.frame if isinstance(tokenizer, TableTokenizer) else ((), ())
    return list(before), list(after)


def encode_inside_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """The same without the frame of a whole text."""
    rest, least = "", AHEAD
    for piece in pieces:
        rest += piece
        if len(rest) > least:
            ids, rest = _encode_to_cut(tokenizer, rest)
            yield ids
            del ids
            least = max(AHEAD, 2 * len(rest))
    yield encode_inside(tokenizer, rest)


def find_cut(tokenizer: Tokenizer, text: str) -> int:
    """A place near the end of a long text at which its tokens can be cut; 0 if none is found."""
    ids, rest = _encode_to_cut(tokenizer, text[-2 * AHEAD :])
    return len(text) - len(rest) if ids else 0


def _encode_to_cut(tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    """The ids before a cut, and the text after it; no ids and all text if no cut is found.

    A cut never follows white space, since an added token may include any amount of it.
    """
    ids, end = encode_inside(tokenizer, text), len(text) - AHEAD
    for place in (last_boundary(text[:end]), *range(end, max(0, end - CUTS), -1)):
        if text[place - 1] not in WHITE:
            tail = encode_inside(tokenizer, text[place:])
            n = len(ids) - len(tail)
            if n >= 0 and ids[n:] == tail:
                del ids[n:]
                return ids, text[place:]
    return [], text
