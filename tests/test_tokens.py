"""A corpus as token ids on the disk: what is written, how it is split, what is refused, how much memory it
takes.
"""

import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lama.data import (
    batch,
    corpora,
    default_corpus,
    encode_corpus,
    evaluation_windows,
    fingerprint,
    open_corpus,
    open_tokens,
    shards,
    split_tail,
    text_corpus,
    tokenize,
)
from lama.data.windows import Mixture
from lama.errors import LamaError, UsageError
from lama.tokenizers import ByteTokenizer, CharacterTokenizer, gpt2_tokenizer, train_bpe
from lama.tokenizers.training import END_OF_TEXT

TEXT = "It was the best of times,\nit was the worst of times, 東京 naïve.\n" * 7


@pytest.fixture
def books(tmp_path):
    """A folder of two documents of 29 and 13 bytes."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz012")
    (tmp_path / "books" / "b.txt").write_text("ABCDEFGHIJKLM")
    return open_corpus([str(tmp_path / "books")])


# --- what is written


@pytest.mark.parametrize(
    "make", [ByteTokenizer, lambda: CharacterTokenizer(TEXT), lambda: train_bpe(TEXT, 280), gpt2_tokenizer]
)
def test_tokens_of_one_text_are_split_as_arrays_are(tmp_path, monkeypatch, make):
    monkeypatch.setattr(corpora.Document.pieces, "__defaults__", (101,))
    monkeypatch.setattr("lama.data.tokens.BLOCK", 7)
    tokenizer, corpus = make(), text_corpus(TEXT, "Times", "a book", "public")
    files = tokenize(corpus, tokenizer, tmp_path / "data")
    train, validation = split_tail(encode_corpus(tokenizer, TEXT))
    np.testing.assert_array_equal(files.train, train)
    np.testing.assert_array_equal(files.validation, validation)
    assert files.train.dtype == train.dtype
    assert files.validation_bytes == len(tokenizer.decode_bytes(validation.tolist()))
    meta = json.loads((tmp_path / "data" / "meta.json").read_text("utf-8"))
    assert sum(meta["bytes"].values()) == len(TEXT.encode())
    assert files.vocab_size == tokenizer.vocab_size
    assert files.corpus == {"name": "Times", "provenance": "a book", "licence": "public"}
    assert (files.text_digest, files.tokenizer_digest) == (corpus.digest(), fingerprint(tokenizer))
    names = ["meta.json", "train.bin", "train.ends.bin", "validation.bin", "validation.ends.bin"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == names
    assert (files.ends["train"].tolist(), files.sources) == ([len(train)], [len(train)])


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "|u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")]
)
def test_tokens_take_the_smallest_little_endian_numbers(tmp_path, vocab_size, dtype):
    tokenizer = CharacterTokenizer("".join(map(chr, [*range(0xD800), *range(0xE000, 0xE000 + vocab_size)])))
    tokenizer = CharacterTokenizer(tokenizer.characters[:vocab_size])
    text = "ab" + tokenizer.characters[-1] * 8
    files = tokenize(text_corpus(text, "some"), tokenizer, tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == np.array([97, 98, *[vocab_size - 1] * 7], dtype).tobytes()
    assert files.validation.tolist() == [vocab_size - 1]


def test_every_document_gives_its_last_part_to_validation(tmp_path, books):
    files = tokenize(books, ByteTokenizer(), tmp_path / "data")
    assert bytes(files.train) == b"abcdefghijklmnopqrstuvwxyz" + b"ABCDEFGHIJK"
    assert bytes(files.validation) == b"012" + b"LM"
    assert files.validation_bytes == 5
    assert (
        bytes(tokenize(books, ByteTokenizer(), tmp_path / "data", validation=0.5).validation)
        == b"opqrstuvwxyz012" + b"GHIJKLM"
    )


def test_documents_are_joined_by_the_end_of_text(tmp_path, books):
    tokenizer = train_bpe(books.text, 257)
    files = tokenize(books, tokenizer, tmp_path / "data")
    assert tokenizer.decode(files.train.tolist()) == f"abcdefghijklmnopqrstuvwxyz{END_OF_TEXT}ABCDEFGHIJK"
    assert tokenizer.decode(files.validation.tolist()) == f"012{END_OF_TEXT}LM"
    assert files.validation_bytes == 5


def test_tokens_of_tinyshakespeare_are_split_as_nanogpt_does(tmp_path):
    path = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tinyshakespeare.txt is not on this machine")
    corpus = open_corpus([str(path)])
    files = tokenize(corpus, CharacterTokenizer(corpus.characters()), tmp_path)
    assert (len(files.train), len(files.validation), files.vocab_size) == (1_003_854, 111_540, 65)
    assert files.validation_bytes == 111_540


def test_tokenize_shows_its_pieces_as_they_come(tmp_path, books):
    seen = []
    tokenize(
        books,
        ByteTokenizer(),
        tmp_path / "data",
        progress=lambda pieces: (seen.append(piece) or piece for piece in pieces),
    )
    assert [text for _, text in seen] == ["abcdefghijklmnopqrstuvwxyz012", "ABCDEFGHIJKLM"]


def test_tokenize_writes_the_same_again(tmp_path, books):
    first = tokenize(books, ByteTokenizer(), tmp_path / "1")
    again = tokenize(books, ByteTokenizer(), tmp_path / "2")
    assert first.digest == again.digest
    assert tokenize(books, ByteTokenizer(), tmp_path / "2", 0.2).digest != first.digest
    assert (tmp_path / "1" / "meta.json").read_bytes() != (tmp_path / "2" / "meta.json").read_bytes()


def test_fingerprint_tells_tokenizers_apart():
    kinds = [
        ByteTokenizer(),
        CharacterTokenizer("ab"),
        CharacterTokenizer("abc"),
        gpt2_tokenizer(),
        train_bpe(TEXT, 270),
        train_bpe(TEXT, 271),
    ]
    assert len({fingerprint(tokenizer) for tokenizer in kinds}) == len(kinds)
    assert fingerprint(train_bpe(TEXT, 270)) == fingerprint(kinds[4])


# --- what is refused


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_tokenize_refuses_a_share_that_is_none(tmp_path, books, share):
    with pytest.raises(UsageError, match=f"a share between 0 and 1; got validation={share}"):
        tokenize(books, ByteTokenizer(), tmp_path / "data", share)
    assert not (tmp_path / "data").exists()


def test_tokenize_that_fails_leaves_the_old_files(tmp_path, books):
    before = tokenize(books, ByteTokenizer(), tmp_path / "data").digest
    with pytest.raises(LamaError, match=r"made of the model's 13 characters .*; got 'a'"):
        tokenize(books, CharacterTokenizer("ABCDEFGHIJKLM"), tmp_path / "data")
    assert open_tokens(tmp_path / "data", verify=True).digest == before
    assert len(list((tmp_path / "data").iterdir())) == 5


def test_tokenize_that_is_ended_between_renames_leaves_no_meta(tmp_path, books, monkeypatch):
    tokenize(books, ByteTokenizer(), tmp_path / "data")
    replaced = []

    def replace(source, target):
        if len(replaced) == 3:  # a shard, meta.json, and the first file that moves
            raise KeyboardInterrupt
        replaced.append(target)
        os.rename(source, target)

    monkeypatch.setattr("lama.data.tokens.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        tokenize(books, ByteTokenizer(), tmp_path / "data", 0.5)
    with pytest.raises(
        LamaError, match=r"must hold train.bin, validation.bin and meta.json; got .*meta.json: No such file"
    ):
        open_tokens(tmp_path / "data")


def test_tokenize_names_a_folder_that_cannot_be_written(tmp_path, books):
    (tmp_path / "file").touch()
    with pytest.raises(LamaError, match=r"the folder \S*file cannot be written: File exists"):
        tokenize(books, ByteTokenizer(), tmp_path / "file")
    with pytest.raises(LamaError, match=r"the folder \S*below cannot be written: Not a directory"):
        tokenize(books, ByteTokenizer(), tmp_path / "file" / "below")


def cut(folder: Path) -> None:
    os.truncate(folder / "train.bin", 36)


def edit(**changes: object):
    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_bytes()) | changes
        (folder / "meta.json").write_text(
            json.dumps({name: value for name, value in meta.items() if value is not None})
        )

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"train\.bin must have 37 bytes, as meta\.json says; got 36\. Tokenise the corpus again"),
        (
            lambda folder: (folder / "validation.bin").unlink(),
            r"got .*validation\.bin: No such file or directory\. Tokenise",
        ),
        (
            lambda folder: (folder / "meta.json").write_text("{"),
            r"meta\.json must be valid JSON; got Expecting property name",
        ),
        (lambda folder: (folder / "meta.json").write_text("[]"), r"meta\.json must be an object; got \[\]"),
        (
            lambda folder: (folder / "meta.json").write_bytes(b"\xff"),
            r"meta\.json must be valid JSON; got byte 0xff at offset 0",
        ),
        (
            lambda folder: (folder / "meta.json").write_text("[" * 100_000),
            r"must be valid JSON; got over 100 levels of lists",
        ),
        (edit(dtype="float64"), r"is damaged: ValueError: dtype 'float64'"),
        (edit(dtype="x" * 9999), r"is damaged: ValueError: dtype 'x{193}\.\.\.\. "),
        (edit(dtype="uint16"), r"train\.bin must have 74 bytes, as meta\.json says; got 37"),
        (edit(sha256=None), r"is damaged: KeyError: 'sha256'"),
        (edit(tokens={"train": "many"}), r"is damaged: ValueError"),
    ],
)
def test_open_tokens_names_what_is_damaged(tmp_path, books, damage, message):
    tokenize(books, ByteTokenizer(), tmp_path)
    damage(tmp_path)
    with pytest.raises(LamaError, match=message) as caught:
        open_tokens(tmp_path)
    assert "\n" not in str(caught.value)


def test_open_tokens_verifies_when_asked_to(tmp_path, books):
    tokenize(books, ByteTokenizer(), tmp_path)
    content = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(content[::-1])
    open_tokens(tmp_path)
    with pytest.raises(
        LamaError,
        match=r"train\.bin must have SHA-256 [0-9a-f]{64}, as meta\.json says; got [0-9a-f]{64}\. Tokenise",
    ):
        open_tokens(tmp_path, verify=True)


# --- memory


@contextmanager
def memory() -> Iterator[Callable[[], int]]:
    """Yields what tells the most bytes that Python and numpy held at once."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_windows_of_a_map_are_copies_of_no_more_than_themselves(tmp_path):
    def cut(data: np.ndarray) -> list[np.ndarray]:
        return [*batch(data, 3, 5, 7, 11), *evaluation_windows(data, 11, 13)]

    files = tokenize(default_corpus(), ByteTokenizer(), tmp_path)
    expected = cut(np.array(files.train))
    assert isinstance(files.train, np.memmap) and not files.train.flags.writeable
    with memory() as peak:
        windows = cut(files.train)
        assert peak() < 100_000
    for window, same in zip(windows, expected, strict=True):
        assert type(window) is np.ndarray
        np.testing.assert_array_equal(window, same)


def test_tokenize_takes_much_less_memory_than_the_text(tmp_path):
    lines = ["".join(random.Random(i).choices("etaoin shrdlu", k=70)) + "\n" for i in range(1000)]
    (tmp_path / "large.txt").write_text("".join(lines) * 700)  # 50 MB
    with memory() as peak:
        files = tokenize(open_corpus([str(tmp_path / "large.txt")]), ByteTokenizer(), tmp_path / "data")
        assert peak() < 20e6
    assert len(files.train) + len(files.validation) == 71 * 1000 * 700
    assert bytes(files.validation[-70:]).decode() == lines[-1][1:]


# --- rows, sources, processes


@pytest.fixture
def rows(tmp_path):
    """Two sources: a file of rows and a text; some rows are equal."""
    texts = [f"row {i % 40} of many, 東京." for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("It was the best of times. " * 40)
    return open_corpus([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")])


def documents(tokenizer, ids, ends):
    parts = zip([0, *ends[:-1]], ends, strict=True)
    return [tokenizer.decode(ids[begin:end].tolist()) for begin, end in parts]


def test_rows_are_held_out_as_wholes_and_sources_have_ends(tmp_path, rows):
    tokenizer = train_bpe(TEXT, 280)
    files = tokenize(rows, tokenizer, tmp_path / "data", 0.25)
    train = documents(tokenizer, files.train, files.ends["train"])
    held = documents(tokenizer, files.validation, files.ends["validation"])
    # After the first document of a part each begins with the separator.
    assert all(text.startswith(END_OF_TEXT) for text in train[1:] + held[1:])
    *some, book = [text.removeprefix(END_OF_TEXT) for text in train]
    *others, last = [text.removeprefix(END_OF_TEXT) for text in held]
    assert sorted(some + others) == sorted(rows.documents[0].rows())
    assert not set(some) & set(others) and 5 < len(others) < 25
    assert book + last == "It was the best of times. " * 40
    assert files.sources == [files.ends["train"][-2], len(files.train)]
    assert files.validation_bytes == len(("".join(others) + last).encode())
    assert files.text_digest == rows.digest()
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert [source["name"] for source in meta["sources"]] == ["a.jsonl", "b.txt"]
    assert meta["sources"][0]["sha256"] == open_corpus([str(tmp_path / "a.jsonl")]).digest()


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_shards_and_processes_change_nothing(tmp_path, rows, kind, monkeypatch):
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe(TEXT, 280)
    whole = tokenize(rows, tokenizer, tmp_path / "1", workers=1)
    monkeypatch.setattr("lama.data.shards.SHARD", 300)
    monkeypatch.setattr("lama.data.pieces.AHEAD", 50)
    monkeypatch.setattr("lama.data.corpora.Document.pieces", small_pieces)
    again = tokenize(rows, tokenizer, tmp_path / "2", workers=2)
    assert again.digest == whole.digest
    assert (again.validation_bytes, again.sources) == (whole.validation_bytes, whole.sources)
    assert sorted(path.name for path in (tmp_path / "2").iterdir())[-1] == "validation.ends.bin"


def small_pieces(document, size=0, pieces=corpora.Document.pieces):
    return pieces(document, 100)


def test_what_a_killed_call_has_encoded_is_used_again(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("lama.data.shards.SHARD", 300)
    expected = tokenize(rows, ByteTokenizer(), tmp_path / "1", workers=1)
    encoded = []
    encode = shards.Shard.encode

    def counting(shard, tokenizer, path):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(path.name)
        encode(shard, tokenizer, path)

    monkeypatch.setattr(shards.Shard, "encode", counting)
    with pytest.raises(KeyboardInterrupt):
        tokenize(rows, ByteTokenizer(), tmp_path / "2", workers=1)
    assert len(list((tmp_path / "2" / ".shards").iterdir())) == 4
    first, encoded[:] = list(encoded), []
    shutil.copytree(tmp_path / "2", tmp_path / "3")
    (tmp_path / "3" / ".shards" / first[2]).write_bytes(b"damaged")
    with pytest.raises(LamaError, match=r"a shard of tokens is damaged: [0-9a-f-]+\.npz: "):
        tokenize(rows, ByteTokenizer(), tmp_path / "3", workers=1)
    encoded.clear()
    monkeypatch.setattr(shards.Shard, "encode", lambda *args: encoded.append(args[2].name) or encode(*args))
    assert tokenize(rows, ByteTokenizer(), tmp_path / "2", workers=1).digest == expected.digest
    assert not set(first) & set(encoded) and not (tmp_path / "2" / ".shards").exists()


def test_an_error_in_a_process_is_the_same_error(tmp_path, monkeypatch):
    monkeypatch.setattr("lama.data.shards.SHARD", 10)
    (tmp_path / "a.jsonl").write_text('{"text": "abcabcabcabc"}\n' * 9 + '{"text": "abcabcabcabx"}\n')
    with pytest.raises(LamaError, match=r"made of the model's 3 characters .*; got 'x'"):
        tokenize(
            open_corpus([str(tmp_path / "a.jsonl")]), CharacterTokenizer("abc"), tmp_path / "d", workers=2
        )
    assert not (tmp_path / "d").exists()


# --- mixtures, and documents in windows


def test_a_mixture_draws_its_sources_by_their_shares():
    data = np.concatenate([np.zeros(1000, np.uint8), np.ones(100, np.uint8)])
    mixture = Mixture([1000, 1100], [1, 3])
    batches = [batch(data, step, 7, 100, 16, mixture) for step in range(20)]
    windows = np.concatenate([np.concatenate([inputs, targets[:, -1:]], 1) for inputs, targets in batches])
    assert (windows == windows[:, :1]).all()  # within a source
    assert 0.7 < windows[:, 0].mean() < 0.8
    for ours, again in zip(batches[3], batch(data, 3, 7, 100, 16, mixture), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_windows_have_the_starts_of_their_documents():
    data, ends = np.arange(20, dtype=np.uint8), np.array([4, 5, 12, 20])
    inputs, targets, starts = evaluation_windows(data, 6, None, ends)
    np.testing.assert_array_equal(inputs[0], range(6))
    np.testing.assert_array_equal(targets[2], range(13, 19))
    np.testing.assert_array_equal(starts, [[0, 0, 0, 0, 4, 5], [0] * 6, [0] * 6])
    inputs, _, starts = batch(data, 0, 0, 50, 6, None, ends)
    for row, begins in zip(inputs, starts, strict=True):
        border = [0, 4, 5, 12]
        document = [max(b for b in border if b <= token) for token in row]
        assert begins.tolist() == [max(0, each - row[0]) for each in document]
