"""BERT's WordPiece: by hand, saved and loaded, and as transformers has it."""

import json
from pathlib import Path

import pytest

from lama.errors import LamaError
from lama.tokenizers import WordPieceTokenizer, load_wordpiece_tokenizer, tokenizer_from_json
from lama.tokenizers.wordpiece import SPECIAL

WORDS = [
    "un",
    "##aff",
    "##able",
    "run",
    "##ning",
    "the",
    "cafe",
    "Café",
    "café",
    ".",
    ",",
    "'",
    "中",
    "##s",
    "$",
    "10",
]
LETTERS = [mark + chr(i) for i in range(33, 127) if chr(i) not in ".,'$" for mark in ("", "##")]
VOCABULARY = list(dict.fromkeys([*SPECIAL, *WORDS, *LETTERS]))
TEXTS = [
    "Unaffable running, the café.",
    "the\u00a0cafe\tcosts $10's\n中文 the",
    "[CLS] un[MASK]able [mask] [SEP]",
    "",
    "ÀÉÎ ẞ ﬁne \u200b zero\u0000width\ufffd e\u0301",
    "a" * 101 + " the " + "a" * 100,
    "naïve—dash “quoted” …¿!",
    "q\u4e00q \U00020000x 한글 カナ",
]


def spelled(tokenizer: WordPieceTokenizer, text: str) -> list[str]:
    return [tokenizer.vocabulary[i] for i in tokenizer.encode(text)]


def test_longest_pieces_first():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    assert spelled(tokenizer, "Unaffable, the Café's") == [
        "un",
        "##aff",
        "##able",
        ",",
        "the",
        "cafe",
        "'",
        "s",
    ]
    assert spelled(tokenizer, "un[MASK]able") == ["un", "[MASK]", "a", "##b", "##l", "##e"]
    assert spelled(tokenizer, "é中") == ["e", "中"] and spelled(tokenizer, "ж") == ["[UNK]"]
    assert spelled(WordPieceTokenizer(VOCABULARY, lower_case=False), "Café the") == ["Café", "the"]
    assert tokenizer.decode(tokenizer.encode("running the cafe")) == " running the cafe"
    assert [tokenizer.vocabulary[i] for i in tokenizer.framed("the")] == ["[CLS]", "the", "[SEP]"]
    assert tokenizer.encode_ordinary("[MASK]")[1:] == tokenizer.encode("mask]")


def test_saved_and_loaded_from_every_form(tmp_path: Path):
    tokenizer = WordPieceTokenizer(VOCABULARY, lower_case=False)
    tokenizer.save(tmp_path)
    assert tokenizer_from_json(tokenizer.to_json(), tmp_path).encode("Café") == tokenizer.encode("Café")  # type: ignore[union-attr]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_wordpiece_tokenizer(tmp_path).encode("Café un") == tokenizer.encode("Café un")
    (tmp_path / "vocab.txt").unlink()
    spec = {
        "model": {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(VOCABULARY)}},
        "normalizer": {"lowercase": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert spelled(load_wordpiece_tokenizer(tmp_path), "Café") == ["cafe"]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(LamaError, match=r"must have its vocab.txt, or a WordPiece tokenizer.json"):
        load_wordpiece_tokenizer(tmp_path)
    with pytest.raises(LamaError, match=r"got none of \[SEP\], \[MASK\]"):
        WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]"])


@pytest.mark.peers
@pytest.mark.parametrize("lower", [True, False])
def test_ids_are_those_of_transformers(tmp_path: Path, lower: bool):
    transformers = pytest.importorskip("transformers")
    mine = WordPieceTokenizer(VOCABULARY, lower)
    mine.save(tmp_path)
    theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=lower)
    assert theirs.vocab_size == mine.vocab_size
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert mine.framed(text) == theirs.encode(text)
