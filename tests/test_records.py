"""Corpora in rows: JSON lines and Parquet, packed or not; what is wrong has its file and line."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lama.data import open_corpus
from lama.errors import LamaError

TEXTS = ["one\ntwo", "drei é", "four"]


def lines_of(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write(path: Path) -> str:
    """The texts in a file of the kind that its name says."""
    content = lines_of(TEXTS)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="not installed: pip install lama[data]")
        path.write_bytes(zstandard.ZstdCompressor().compress(content))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="not installed: pip install lama[data]")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": TEXTS}), path, row_group_size=2)
    else:
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.zst", "a.parquet"])
def test_each_row_is_a_document(tmp_path: Path, name: str):
    corpus = open_corpus([write(tmp_path / name)])
    assert list(corpus.pieces()) == TEXTS and corpus.documents[0].has_rows
    assert corpus.n_bytes == sum(len(text.encode()) for text in TEXTS)
    # In a folder it is found too, beside a text.
    (tmp_path / "b.txt").write_text("five")
    assert list(open_corpus([str(tmp_path)]).pieces()) == [*TEXTS, "five"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_text_is_one_document(tmp_path: Path, suffix: str):
    content = b"a text\nof two lines " * 9000
    if suffix == ".gz":
        packed = gzip.compress(content)
    else:
        packed = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    corpus = open_corpus([str(tmp_path / f"a.txt{suffix}")])
    assert corpus.text.encode() == content and not corpus.documents[0].has_rows
    (tmp_path / f"a.txt{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(LamaError, match=r"^the corpus .*a\.txt\.\w+ cannot be read: [^\n]+$"):
        open_corpus([str(tmp_path / f"a.txt{suffix}")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"line 3 of .*a\.jsonl must be valid JSON; got Expecting ',' "),
        (b'{"text": "a"}\n["text"]\n', r"line 2 of .*a\.jsonl must be an object; got \['text'\]"),
        (b'{"text": "a"}\n{"txt": "b"}\n', r"line 2 of .*a\.jsonl must have text; got txt"),
        (b'{"text": "a"}\n{"text": 3}\n', r"text in line 2 of .*a\.jsonl must be a text; got 3"),
        (b'{"text": "a"}, {"text": "b"}\n', r"line 1 of .*a\.jsonl must be valid JSON; got Extra data"),
        (b'{"text": "\xff"}\n', r"line 1 of .*a\.jsonl must be valid JSON; got byte 0xff"),
        (b'{"text": " "}\n\n', r"a corpus must hold some text; got an empty file, .*a\.jsonl"),
    ],
)
def test_what_is_wrong_in_a_row_is_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(LamaError, match=message) as caught:
        open_corpus([str(tmp_path / "a.jsonl")])
    assert "\n" not in str(caught.value)


def test_a_line_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lama.data.records.LONGEST", 100)
    (tmp_path / "a.jsonl").write_bytes(lines_of(["a", "b" * 100]))
    with pytest.raises(LamaError, match="a line must have at most 100 bytes; got more in line 2 of"):
        open_corpus([str(tmp_path / "a.jsonl")])


def test_other_parquet_files_are_refused(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="not installed: pip install lama[data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(LamaError, match=r"a\.parquet must have a column text; got body"):
        open_corpus([str(tmp_path / "a.parquet")])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(LamaError, match=r"the corpus .*a\.parquet cannot be read: "):
        open_corpus([str(tmp_path / "a.parquet")])


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(LamaError, match=r"^zstandard is not installed\. Run: pip install zstandard$"):
        open_corpus([str(tmp_path / "a.txt.zst")])
