"""BERT's WordPiece: words and punctuation, then the longest pieces of them in the vocabulary.

Source: google-research/bert, tokenization.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from lama.errors import LamaError
from lama.tokenizers.base import WHITE, Common, to_utf8
from lama.tokenizers.library import LibraryTokenizer, Pipeline, TokenModel
from lama.tokenizers.special import AddedToken

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OPTIONS = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}  # of BERT's model
BERT_SPLIT: dict[str, object] = {"type": "BertPreTokenizer"}


class WordPieceTokenizer(LibraryTokenizer):
    """One id for each line of `vocabulary`; `##ing` continues a word. `encode("Unaffable.")`: un, ##aff, ...

    `lower_case` also removes accents. `decode` writes a space before every word. `encode` has no frame of
    [CLS] and [SEP]; `framed` has it.
    """

    def __init__(self, vocabulary: Sequence[str], lower_case: bool = True):
        """Raises LamaError for a vocabulary without [PAD], [UNK], [CLS], [SEP] and [MASK]."""
        ids = {token: i for i, token in enumerate(vocabulary)}
        if missing := [token for token in SPECIAL if token not in ids]:
            got = f"got none of {', '.join(missing)}"
            raise LamaError(f"a WordPiece vocabulary must have {', '.join(SPECIAL)}; {got}")
        pipeline = Pipeline(
            TokenModel("WordPiece", ids, "[UNK]", options=OPTIONS),
            bert_normalizer(lowercase=lower_case),
            BERT_SPLIT,
            [AddedToken(token, ids[token]) for token in SPECIAL],
        )
        files = {"vocab.txt": to_utf8("".join(f"{token}\n" for token in vocabulary))}
        frame = [ids["[CLS]"]], [ids["[SEP]"]]
        spec = {"kind": "wordpiece", "lower_case": lower_case}
        self._fill(pipeline, Common(None, frame, spec, files))

    @classmethod
    def of(cls, pipeline: Pipeline, common: Common) -> "WordPieceTokenizer":
        """Build from a pipeline. The frame is that of `framed`."""
        tokenizer = cls.__new__(cls)
        tokenizer._fill(pipeline, common)
        return tokenizer

    def _fill(self, pipeline: Pipeline, common: Common) -> None:
        LibraryTokenizer.__init__(self, pipeline, replace(common, frame=((), ())))
        self.marks = common.frame

    def framed(self, text: str) -> list[int]:
        """[CLS] text [SEP], or the files' own frame: the input that BERT was trained on."""
        return [*self.marks[0], *self.encode(text), *self.marks[1]]


def bert_normalizer(**options: object) -> dict[str, object]:
    """BERT's own normalizer, with some options replaced."""
    own = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    return {"type": "BertNormalizer", **own, **options}


def text_lines(content: bytes, source: object) -> list[str]:
    """The lines of a file such as vocab.txt, without trailing white space. Raises LamaError."""
    try:
        return [line.rstrip(WHITE) for line in content.decode().removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        got = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise LamaError(f"{source} must be UTF-8; got {got}") from None
