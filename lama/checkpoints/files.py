"""The files of a model's tensors: finding them in a folder, and opening them."""

import os
import re
from pathlib import Path

from lama.checkpoints.safetensors_files import open_safetensors
from lama.checkpoints.tensor import FileTensor
from lama.checkpoints.torch_files import read_torch
from lama.errors import LamaError, quoted
from lama.files import AGAIN, quoted_path, read_object

# In order of preference: safetensors files are checked more strictly and cannot contain code.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LOCAL_FILES = (*WEIGHT_FILES, "ckpt.pt")  # nanoGPT's file is not on the hub
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
A_MODEL = "model must be a name, or the path of a folder or file"
READABLE = "lama reads safetensors, GGUF, PyTorch's .bin and nanoGPT's ckpt.pt"


def is_model_folder(folder: Path) -> bool:
    """Whether a folder has a config.json or weights."""
    return os.path.exists(folder / "config.json") or weight_file(folder) is not None


def weight_file(folder: Path) -> Path | None:
    """The file to open for the tensors in a folder: the weights, or the index of their shards."""
    found = next((folder / name for name in LOCAL_FILES if os.path.exists(folder / name)), None)
    return found or _only_gguf(folder)


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has exactly one, or its first part if it is split."""
    names = os.listdir(folder) if os.path.isdir(folder) and os.access(folder, os.R_OK) else []
    found = sorted(name for name in names if name.endswith(".gguf"))
    stems = {re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-\1", name) for name in found}
    return folder / found[0] if len(stems) == 1 else None


def all_weight_files(folder: Path) -> list[Path]:
    """The `weight_file` and the shards that it lists; none if one of them is missing."""
    first = weight_file(folder)
    if first is None:
        return []
    files = [first, *(shard_files(first) if first.name.endswith(".index.json") else [])]
    return files if all(os.path.isfile(file) for file in files) else []


def open_weights(path: Path) -> dict[str, FileTensor]:
    """Open the tensors of a weight file, or of the shards that an `.index.json` lists. Raises LamaError."""
    check_regular(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return read_torch(path)[0]
    raise LamaError(unreadable(path))


def check_regular(path: Path) -> None:
    """Raise LamaError for anything but a regular file, such as a pipe, which may never end."""
    if not os.path.isfile(path):
        got = "something else" if os.path.exists(path) else "none"
        raise LamaError(f"{quoted_path(path)} must be a regular file; got {got}")


def unreadable(path: Path) -> str:
    """The error message for a file or a folder that is not a model."""
    where, is_folder = quoted_path(path), os.path.isdir(path)
    names = os.listdir(path) if is_folder and os.access(path, os.R_OK) else [path.name]
    if is_folder and (several := sorted(name for name in names if name.endswith(".gguf"))):
        got = quoted(", ".join(several), plain=True)
        return f"a folder must have one GGUF file; got {got} in {where}. Name one of them"
    if not is_folder:
        return f"cannot read {where}: not a weight file; {READABLE}"
    if "config.json" in names:
        return f"a model's folder must hold model.safetensors or pytorch_model.bin; got neither in {where}"
    return f"{A_MODEL}; got {quoted(str(path))}, a folder without config.json or {', '.join(LOCAL_FILES)}"


def read_json(path: Path) -> dict[str, object]:
    """The object in a model's JSON file. Raises LamaError if it is missing or is not an object."""
    if not os.path.lexists(path):
        folder = "the current folder" if path.parent == Path() else quoted_path(path.parent)
        got = f"got none in {folder}. Copy it there"
        raise LamaError(f"a model must have {path.name} beside its weights; {got}")
    return read_object(path)


def shard_files(index: Path) -> list[Path]:
    """The distinct files that an index lists. Raises LamaError for no files, or one outside its folder."""
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor. Raises LamaError as `shard_files` does."""
    source, found = quoted_path(index), read_json(index).get("weight_map")
    listed = found if isinstance(found, dict) else {}
    if not listed or not all(isinstance(name, str) for name in listed.values()):
        raise LamaError(f"{source} must have a weight_map of tensors to files; got {quoted(found)}. {AGAIN}")
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
        raise LamaError(f"shards must be in the folder of {source}; got {quoted(outside[0])}")
    if wrong := [name for name in names if not name.endswith((".safetensors", ".bin"))]:
        raise LamaError(f"shards must be .safetensors or .bin files; got {quoted(wrong[0])} in {source}")
    return listed


def _open_shards(index: Path) -> dict[str, FileTensor]:
    listed = _weight_map(index)
    names = sorted(set(listed.values()))
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        got = f"{quoted(', '.join(missing), plain=True)} in {quoted_path(index.parent)}"
        raise LamaError(f"shards that {index.name} lists are missing: {got}")
    tensors: dict[str, FileTensor] = {}
    for file in (index.parent / name for name in names):
        shard = open_weights(file)
        if twice := sorted(tensors.keys() & shard.keys()):
            got = f"{quoted(twice[0], plain=True)} in {quoted_path(file)} and in another shard"
            raise LamaError(f"a tensor must be in one shard only; got {got}")
        tensors |= shard
    if absent := sorted(listed.keys() - tensors.keys()):
        got = f"{quoted(absent[0], plain=True)}, which is not in {listed[absent[0]]}"
        raise LamaError(f"{quoted_path(index)} must list tensors that its shards hold; got {got}")
    return tensors
