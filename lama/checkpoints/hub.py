"""Where a model is: a path, `weights/NAME/`, the Hugging Face cache, or the Hugging Face Hub.

huggingface_hub is imported only when its cache or the network is needed. What comes from the network is held against the
hashes that the hub declares, and so are config and weights in the cache where its links name their hashes, once for each
file (`verified.json` remembers).
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lama.checkpoints.files import ENDINGS, WEIGHT_FILES, all_weight_files, is_model_folder, unreadable
from lama.compiler import cache_folder
from lama.errors import LamaError, first_line, quoted
from lama.files import read_object
from lama.tokenizers.huggingface import TOKENIZER_FILES

EMBEDDED = "lama-bpe"  # the model that ships with lama, in weights/
HUB_IDS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
PACKAGE = Path(__file__).parent.parent  # has the weights that ship when it was installed from a wheel
REPOSITORY = PACKAGE.parent  # has them when it is a checkout


class NotFound(LamaError):
    """The model is in none of the places where it could be."""


@dataclass(frozen=True)
class Found:
    """Where a model is, and where it was looked for."""

    path: Path
    """A folder, or a weight file with its config.json beside it."""
    origin: str
    """path, weights, cache or download."""
    looked: tuple[str, ...]
    """All places looked at, in order, the last one being where it was."""


def find(name: str | Path, *, offline: bool = False, revision: str | None = None) -> Found:
    """The model called `name`: a folder, a `.safetensors` or `.bin` file, `gpt2` and its sizes, or `owner/name` on the hub.

    Names are looked for in `weights/NAME/` of lama itself and of the current folder, then in the Hugging Face cache, then
    downloaded, unless `offline` or HF_HUB_OFFLINE says not to. A `revision` (branch, tag or commit) is looked for in the
    cache and on the hub only: `weights/` has none.
    Raises NotFound with all the places looked at, and LamaError for a file whose hash is not the hub's.
    """
    name = str(name)
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # no such user's home
        raise NotFound(f"model must be a name, or the path of a folder or file; got {quoted(name)} ({first_line(error)})") from error
    # A file called like a known model does not hide it.
    if is_model_folder(path) or (os.path.isfile(path) and (path.name.endswith(ENDINGS) or name not in known_names())):
        return Found(path, "path", (name,))
    looked: list[str] = []
    if not is_a_name(name):
        if os.path.isdir(path) or path.suffix == ".gguf":
            raise NotFound(unreadable(path))
        raise NotFound(f"model must be a name, or the path of a folder or file; got {quoted(name)}, nothing there")
    for folder in [] if revision else weight_folders():
        looked.append(str(folder / name))
        if is_model_folder(folder / name):
            return Found(folder / name, "weights", tuple(looked))
    for repository in [HUB_IDS[name], name] if name in HUB_IDS else [name]:  # transformers keeps `gpt2` under the name it was asked for
        cached = find_in_cache(repository, revision, looked)
        if cached is not None:
            return Found(cached, "cache", tuple(looked))
    if os.path.isdir(path) and name not in HUB_IDS:
        raise NotFound(unreadable(path))
    if name not in HUB_IDS and "/" not in name:
        raise NotFound(
            f"model must be a path, owner/name on the hub, or a name that is known here; got {quoted(name)}.{suggestion(name)}{_in(looked)}"
        )
    return Found(download(name, HUB_IDS.get(name, name), revision, offline, looked), "download", tuple(looked))


def is_a_name(name: str) -> bool:
    """`gpt2`, `lama-bpe` or `owner/name`, not a path."""
    return re.fullmatch(r"[\w-][\w.-]{,95}(/[\w-][\w.-]{,95})?", name) is not None and not name.endswith((*ENDINGS, ".json", ".gguf"))


def weight_folders() -> list[Path]:
    """The folders whose sub-folders are models: lama's own `weights`, then the current folder's."""
    own = PACKAGE / "weights" if (PACKAGE / "weights").is_dir() else REPOSITORY / "weights"
    try:
        return list(dict.fromkeys([own, Path.cwd() / "weights"]))
    except OSError:  # the current folder was removed
        return [own]


def known_names() -> list[str]:
    """The names that need no path: GPT-2's sizes and what lies in `weights`."""
    parents = [parent for parent in weight_folders() if os.access(parent, os.R_OK | os.X_OK)]
    here = (name for parent in parents for name in os.listdir(parent) if is_model_folder(parent / name))
    return sorted({*HUB_IDS, *here})


def suggestion(name: str) -> str:
    """` Did you mean gpt2-medium?`, or the names there are."""
    near = difflib.get_close_matches(name, known_names(), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else f" Names known here: {', '.join(known_names())}."


def _in(looked: Iterable[str]) -> str:
    return f" Looked in: {', '.join(looked)}" if looked else ""


def find_in_cache(repository: str, revision: str | None, looked: list[str]) -> Path | None:
    """The repository's snapshot in the Hugging Face cache, if it is complete. Adds the place to `looked`.

    Raises LamaError if a file there is not the one that its name, the hub's hash, says.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    looked.append(str(Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"))
    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError as error:  # not a name that the hub could have
        raise NotFound(f"model must be owner/name as the hub spells it; got {quoted(repository)} ({first_line(error)})") from error
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    files = all_weight_files(folder)
    if not files:
        return None
    for file in (Path(config), *files):
        if file.is_symlink() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob := Path(os.readlink(file)).name):
            check_hash(file, blob, f"Delete {file.resolve()} and run again")
    return folder


def download(name: str, repository: str, revision: str | None, offline: bool, looked: list[str]) -> Path:
    """Fetch config, tokenizer and weights into the Hugging Face cache, with a progress bar; returns the snapshot's folder.

    Raises NotFound if the hub has no such model or cannot be reached, LamaError if what came is not what it declared.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    by_hand = f"Put config.json and model.safetensors into weights/{name}/ by hand."
    if offline or constants.HF_HUB_OFFLINE:
        raise NotFound(f"model {name} must be here when offline; got nothing in {', '.join(looked)}. {by_hand}")
    looked.append(f"{constants.ENDPOINT}/{repository}")
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files = {file.rfilename: file for file in info.siblings or []}
        wanted = wanted_files(files)
        if not wanted:
            raise NotFound(f"model {name} must have {' or '.join(WEIGHT_FILES)} on the hub; got {', '.join(sorted(files)) or 'no files'}")
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"revision must exist on the hub; got {quoted(revision)} for {repository}") from error
    except errors.RepositoryNotFoundError as error:  # the hub's answer for private ones as well
        raise NotFound(f"model must be one that the hub has; got {quoted(name)}.{suggestion(name)}{_in(looked)}") from error
    except LamaError:
        raise
    except Exception as error:  # every HTTP client has its own family of errors, and huggingface_hub has changed clients
        raise NotFound(f"model {name} must be here or downloadable; got: {first_line(error)}.{_in(looked)}. {by_hand}") from error
    asked = revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else info.sha
    if folder.name != asked:
        raise LamaError(f"the hub must send the revision that was asked for; got {folder.name} instead of {asked}. Try again")
    for file in wanted:
        check_download(folder / file, files[file])
    return folder


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files: config, tokenizer, and one form of the weights; nothing if there are no weights."""
    names = set(names)
    first = next((name for name in WEIGHT_FILES if name in names), None)
    if first is None:
        return []
    stem, _, suffix = first.removesuffix(".index.json").partition(".")
    shards = [name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)] if first.endswith(".index.json") else []
    return [*sorted(names & {"config.json", "generation_config.json", "vocab.txt", *TOKENIZER_FILES}), first, *sorted(shards)]


def check_download(path: Path, declared: Any) -> None:
    """Hold a downloaded file against its size and hash in the hub's listing; removes it and raises LamaError if it differs."""
    again = "It was removed; run again to download it anew"
    try:
        size = path.stat().st_size
        if declared.size is not None and size != declared.size:
            raise LamaError(f"{path} must have the size that the hub declares, {declared.size} bytes; got {size}. {again}")
        digest = declared.lfs.sha256 if declared.lfs else declared.blob_id
        if digest:
            check_hash(path, digest, again)
    except LamaError:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise


def check_hash(path: Path, digest: str, advice: str) -> None:
    """Raises LamaError unless the file's SHA-256 (64 digits) or git object id (40) is `digest`.

    A file that passed is not read again while its size and time of change stay the same.
    """
    state = path.stat()
    stamp = [digest, state.st_size, state.st_mtime_ns]
    record = cache_folder() / "verified.json"
    verified = _read_record(record)
    if verified.get(str(path.resolve())) == stamp:
        return
    if (found := hash_file(path, len(digest))) != digest:
        raise LamaError(f"{path} must have the hash that the hub declares, {digest}; got {found}: it is damaged. {advice}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(f"{record.name}.{os.getpid()}")
        temporary.write_text(json.dumps(_read_record(record) | {str(path.resolve()): stamp}))
        os.replace(temporary, record)
    except OSError:
        pass  # it will be checked again next time


def _read_record(record: Path) -> dict[str, Any]:
    try:
        return read_object(record)
    except LamaError:
        return {}


def hash_file(path: Path, digits: int) -> str:
    """SHA-256 for 64 digits; for 40 git's object id: SHA-1 over a header with the length, then the file."""
    digest = hashlib.sha256() if digits == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
