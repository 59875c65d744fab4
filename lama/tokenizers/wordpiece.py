"""BERT's WordPiece: words and punctuation, then the longest pieces of them that the vocabulary has.

Source: google-research/bert, tokenization.py.
"""

from collections.abc import Sequence
from typing import Any

from lama.errors import LamaError
from lama.tokenizers.base import WHITE, Frame, to_utf8
from lama.tokenizers.library import LibraryTokenizer, Pipeline
from lama.tokenizers.special import special

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPieceTokenizer(LibraryTokenizer):
    """One id a line of `vocabulary`, in which `##ing` continues a word. `encode("Unaffable.")` is un, ##aff, ##able, ".".

    With `lower_case`, text is lowered and loses its accents. In `decode` every word has a space before it. `encode`
    leaves out what frames a text, [CLS] and [SEP]; `framed` has it.
    """

    def __init__(self, vocabulary: Sequence[str], lower_case: bool = True):
        """Raises LamaError for a vocabulary without [PAD], [UNK], [CLS], [SEP] and [MASK]."""
        ids = {token: i for i, token in enumerate(vocabulary)}
        if missing := [token for token in SPECIAL if token not in ids]:
            raise LamaError(f"a WordPiece vocabulary must have {', '.join(SPECIAL)}; got none of {', '.join(missing)}")
        pipeline = Pipeline(wordpiece_model(ids), bert_normalizer(lowercase=lower_case), BERT_SPLIT, [special(t, ids[t]) for t in SPECIAL])
        files = {"vocab.txt": to_utf8("".join(f"{token}\n" for token in vocabulary))}
        frame = [ids["[CLS]"]], [ids["[SEP]"]]
        self._of(pipeline, None, frame, {"kind": "wordpiece", "lower_case": lower_case}, files)

    @classmethod
    def of(cls, *args: Any) -> "WordPieceTokenizer":
        """A tokenizer of the arguments of LibraryTokenizer, the frame being that of `framed`."""
        tokenizer = cls.__new__(cls)
        tokenizer._of(*args)
        return tokenizer

    def _of(self, pipeline: Pipeline, end_of_text: int | None, marks: Frame, *args: Any) -> None:
        LibraryTokenizer.__init__(self, pipeline, end_of_text, ((), ()), *args)
        self.marks = marks

    def framed(self, text: str) -> list[int]:
        """[CLS] text [SEP], or what else the files put around a text: what BERT was trained on, as transformers gives it."""
        return [*self.marks[0], *self.encode(text), *self.marks[1]]


BERT_SPLIT = {"type": "BertPreTokenizer"}


def bert_normalizer(**options: Any) -> dict[str, Any]:
    """BERT's own, with other options where they are given."""
    own = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    return {"type": "BertNormalizer"} | own | options


def wordpiece_model(vocabulary: dict[str, int], **options: Any) -> dict[str, Any]:
    """BERT's model of these ids, with other options where they are given."""
    own = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return {"type": "WordPiece", "vocab": vocabulary} | own | options


def text_lines(content: bytes, source: object) -> list[str]:
    """The lines of a file such as vocab.txt without the white space at their ends. Raises LamaError."""
    try:
        return [line.rstrip(WHITE) for line in content.decode().removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise LamaError(f"{source} must be UTF-8; got byte 0x{content[error.start]:02x} at offset {error.start}") from None
