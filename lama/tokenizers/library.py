"""Tokenizers on the engine of Hugging Face's library `tokenizers`, for what tiktoken's engine does not do."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lama.errors import LamaError, first_line, quoted
from lama.tokenizers.base import Frame, TableTokenizer
from lama.tokenizers.bpe import byte_alphabet, missing_byte, spell


@dataclass(frozen=True)
class Pipeline:
    """The steps from a text to ids, as tokenizer.json writes them; `added` are in the order of adding.

    With `split_special` the special ones among the added tokens are read as text. `source` names the file in messages.
    """

    model: Mapping[str, Any]
    normalizer: Any
    pre_tokenizer: Any
    added: Sequence[Mapping[str, Any]]
    split_special: bool = False
    source: str = "the tokenizer"


class LibraryTokenizer(TableTokenizer):
    """Byte-level BPE or WordPiece with any normalizer and pre-tokenizer that the library knows."""

    def __init__(self, pipeline: Pipeline, end_of_text: int | None = None, frame: Frame = ((), ()), *saved: Any):
        """`saved`: `spec` and `files` of TableTokenizer. Raises LamaError for a pipeline that the library refuses."""
        model = pipeline.model
        added = {token["id"]: token["content"] for token in pipeline.added}
        self.vocabulary = {i: token for token, i in model["vocab"].items()} | added
        """Each id's token, as the files write it."""
        if model["type"] == "BPE":
            table = {i: spell(token) for i, token in self.vocabulary.items()} | {i: token.encode() for i, token in added.items()}
        else:
            prefix = model["continuing_subword_prefix"]
            table = {i: (t[len(prefix) :] if t.startswith(prefix) else f" {t}").encode() for i, t in self.vocabulary.items()}
        super().__init__(table, end_of_text, frame, *saved)
        self._missing = -1
        if model["type"] == "BPE" and model["unk_token"] not in model["vocab"] and not model["vocab"].keys() >= byte_alphabet().keys():
            # The library leaves out what it cannot spell. A token that no merge makes tells where that is.
            self._missing = self.vocab_size
            model = {**model, "vocab": {**model["vocab"], "\0": self.vocab_size}, "unk_token": "\0", "fuse_unk": False}
        self._pipeline, self._model = pipeline, model
        self._engine = self._build(pipeline.added)
        self._engine.encode_special_tokens = pipeline.split_special
        self._plain: Any = None  # without added tokens; made when it is asked for

    def _build(self, added: Sequence[Mapping[str, Any]]) -> Any:
        from tokenizers import Tokenizer  # here, so that importing lama stays light

        vocabulary = self._model["vocab"]
        new = {token["content"]: token["id"] for token in added if token["content"] not in vocabulary}
        following = list(range(len(vocabulary), len(vocabulary) + len(new)))
        if max(vocabulary.values()) >= len(vocabulary) or list(new.values()) != following:
            vocabulary = vocabulary | new  # or else the library would number them itself
        steps = {name: getattr(self._pipeline, name) for name in ("normalizer", "pre_tokenizer")}
        for name, step in steps.items():  # each alone, so that the message can name it
            with _refusing(f"{name} must be one that the library tokenizers knows; got {quoted(step)} in {self._pipeline.source}"):
                Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, name: step}))
        with _refusing(f"{self._pipeline.source} cannot be read"):
            return Tokenizer.from_str(json.dumps({"model": {**self._model, "vocab": vocabulary}, "added_tokens": added, **steps}))

    def _ids(self, text: str, added: bool) -> list[int]:
        if not added and self._plain is None:
            self._plain = self._build([])
        with _refusing(f"the tokenizer cannot encode {quoted(text, 40)}"):
            encoding = (self._engine if added else self._plain).encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._missing in ids:
            start, end = encoding.offsets[ids.index(self._missing)]
            known = {byte for character, byte in byte_alphabet().items() if character in self._model["vocab"]}
            raise missing_byte(bytes([byte for byte in text[start:end].encode() if byte not in known][:1]), text)
        return ids


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn the library's errors, and its panics, which are no Exceptions, into a LamaError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LamaError(f"{what} ({first_line(error)})") from None
