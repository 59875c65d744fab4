"""Tokenizers on the engine of Hugging Face's library `tokenizers`, for what tiktoken's engine cannot do."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lama.errors import LamaError, first_line, quoted
from lama.files import Json
from lama.tokenizers.base import Common, TableTokenizer
from lama.tokenizers.bpe import byte_alphabet, missing_byte, spell
from lama.tokenizers.special import AddedToken

MOST_GROWTH = 10_000
"""Largest number of characters that a normalizer may write in place of one."""


@dataclass(frozen=True)
class TokenModel:
    """The model of a tokenizer.json."""

    type: str
    """BPE or WordPiece."""
    vocab: dict[str, int]
    unk_token: str | None = None
    merges: list[str] = field(default_factory=list)
    """BPE: each merge as "first second"."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The other fields."""

    def to_json(self) -> dict[str, object]:
        fields = {"type": self.type, "vocab": self.vocab, "unk_token": self.unk_token, **self.options}
        return fields | {"merges": self.merges} if self.type == "BPE" else fields


@dataclass(frozen=True)
class Pipeline:
    """The steps from a text to ids, as in tokenizer.json; `added` are in the order of adding.

    `split_special`: special tokens are ordinary text. `source` names the file in error messages.
    """

    model: TokenModel
    normalizer: Json
    pre_tokenizer: Json
    added: Sequence[AddedToken]
    split_special: bool = False
    source: str = "the tokenizer"


class LibraryTokenizer(TableTokenizer):
    """BPE or WordPiece with any normalizer and pre-tokenizer that the library knows."""

    def __init__(self, pipeline: Pipeline, common: Common, of_pieces: bool = False):
        """`of_pieces`: tokens are text with ▁ for a space, as SentencePiece writes them, and not bytes.

        Raises LamaError for a pipeline that the library refuses.
        """
        model = pipeline.model
        added = {token.id: token.content for token in pipeline.added}
        self.vocabulary = {i: token for token, i in model.vocab.items()} | added
        """Each id's token, as the files write it."""
        if of_pieces:
            spelled = SpelledTokens(self.vocabulary, _piece)
        elif model.type == "BPE":
            spelled = SpelledTokens(self.vocabulary, spell, added)
        else:
            prefix = str(model.options["continuing_subword_prefix"])
            spelled = SpelledTokens(self.vocabulary, partial(_word_or_rest, prefix))
        super().__init__(spelled, common)
        self.added = pipeline.added
        self._missing = -1
        letters = byte_alphabet().keys()
        is_bytes = model.type == "BPE" and not of_pieces
        if is_bytes and model.unk_token not in model.vocab and not model.vocab.keys() >= letters:
            # The library drops bytes that it cannot spell. Mark them by a token that no merge makes.
            self._missing = self.vocab_size
            vocab = {**model.vocab, "\0": self.vocab_size}
            model = replace(model, vocab=vocab, unk_token="\0", options={**model.options, "fuse_unk": False})
        self._pipeline = pipeline
        self._model = model
        self._engine = self._build(pipeline.added)
        self._engine.encode_special_tokens = pipeline.split_special
        self._plain: Any = None  # without added tokens

    def _build(self, added: Sequence[AddedToken]) -> Any:
        from tokenizers import Tokenizer  # late: importing lama stays light

        vocab, source = self._model.vocab, self._pipeline.source
        new = {token.content: token.id for token in added if token.content not in vocab}
        following = list(range(len(vocab), len(vocab) + len(new)))
        if max(vocab.values()) >= len(vocab) or list(new.values()) != following:
            vocab = vocab | new  # else the library would number them itself
        steps = {"normalizer": self._pipeline.normalizer, "pre_tokenizer": self._pipeline.pre_tokenizer}
        for name, step in steps.items():  # each alone, to name it in the message
            rule = "be one that the library tokenizers knows"
            with _refusing(f"{name} must {rule}; got {quoted(step)} in {source}"):
                nothing = {"type": "BPE", "vocab": {}, "merges": []}
                Tokenizer.from_str(json.dumps({"model": nothing, name: step}))
        if (growth := _growth(self._pipeline.normalizer)) > MOST_GROWTH:
            rule = f"normalizer must write at most {MOST_GROWTH:,} characters in place of one"
            raise LamaError(f"{rule}; got {quoted(growth)} in {source}")
        model = replace(self._model, vocab=vocab).to_json()
        with _refusing(f"{source} cannot be read"):
            whole = {"model": model, "added_tokens": [vars(token) for token in added], **steps}
            return Tokenizer.from_str(json.dumps(whole, ensure_ascii=False))

    def _ids(self, text: str, added: bool) -> list[int]:
        if not added and self._plain is None:
            self._plain = self._build([])
        with _refusing(f"the tokenizer cannot encode {quoted(text, 40)}"):
            encoding = (self._engine if added else self._plain).encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._missing in ids:
            start, end = encoding.offsets[ids.index(self._missing)]
            known = {byte for character, byte in byte_alphabet().items() if character in self._model.vocab}
            unknown = bytes([byte for byte in text[start:end].encode() if byte not in known])
            raise missing_byte(unknown[:1], text)
        return ids


class SpelledTokens(Mapping[int, bytes]):
    """The bytes of each id, spelled when they are first needed: a short text needs few of them."""

    def __init__(
        self, vocabulary: Mapping[int, str], spelling: Callable[[str], bytes], texts: Collection[int] = ()
    ):
        """`texts`: ids whose tokens are their own text."""
        self._vocabulary, self._spelling, self._texts = vocabulary, spelling, texts
        self._known: dict[int, bytes] = {}

    def __getitem__(self, i: int) -> bytes:
        if i not in self._known:
            token = self._vocabulary[i]
            self._known[i] = token.encode() if i in self._texts else self._spelling(token)
        return self._known[i]

    def __iter__(self) -> Iterator[int]:
        return iter(self._vocabulary)

    def __len__(self) -> int:
        return len(self._vocabulary)


def _word_or_rest(prefix: str, token: str) -> bytes:
    """The bytes of a token of WordPiece: a word has a space before it, the rest of one a prefix instead."""
    return (token[len(prefix) :] if token.startswith(prefix) else f" {token}").encode()


def _growth(step: Json) -> int:
    """The largest number of characters that a normalizer writes in place of one."""
    match step:
        case {"normalizers": [*inner]}:
            return math.prod(map(_growth, inner))
        case {"pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return max(1, len(content))
        case {"content": str(text)} | {"prepend": str(text)}:  # also where a pattern matches nothing
            return 1 + len(text)
    return 1


def _piece(token: str) -> bytes:
    """The bytes of a token of SentencePiece: text, or the one that `<0x0A>` names."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn the library's errors and its panics (not subclasses of Exception) into a LamaError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LamaError(f"{what} ({first_line(error)})") from None
