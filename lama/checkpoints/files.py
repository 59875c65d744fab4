"""The files that hold a model's tensors: which one a folder has, and one way to open them all."""

import os
from pathlib import Path
from typing import Any

from lama.checkpoints.safetensors_files import open_safetensors
from lama.checkpoints.stored import StoredTensor
from lama.checkpoints.torch_files import open_torch
from lama.errors import LamaError, quoted
from lama.files import AGAIN, quoted_path, read_object

# In the order of preference: safetensors are checked more and cannot hold code.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LOCAL_FILES = (*WEIGHT_FILES, "ckpt.pt")  # and nanoGPT's, which no hub offers in place of the others
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
READABLE = "lama reads safetensors, PyTorch's .bin and nanoGPT's ckpt.pt"


def is_model_folder(folder: Path) -> bool:
    """Whether it looks like a model's folder: has a config.json or weights."""
    return os.path.exists(folder / "config.json") or weight_file(folder) is not None


def weight_file(folder: Path) -> Path | None:
    """The file in `folder` to open for its tensors: the weights themselves, or the index of their shards."""
    return next((folder / name for name in LOCAL_FILES if os.path.exists(folder / name)), None)


def all_weight_files(folder: Path) -> list[Path]:
    """That file and the shards it lists; none if one of them is not there."""
    first = weight_file(folder)
    if first is None:
        return []
    files = [first, *(shard_files(first) if first.name.endswith(".index.json") else [])]
    return files if all(os.path.isfile(file) for file in files) else []


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a weight file, or of the shards that an `.index.json` lists. Raises LamaError."""
    check_regular(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return open_torch(path)
    raise LamaError(unreadable(path))


def check_regular(path: Path) -> None:
    """Raises LamaError for what is no file, such as a pipe, which could be without an end."""
    if not os.path.isfile(path):
        raise LamaError(f"{quoted_path(path)} must be a regular file; got {'something else' if os.path.exists(path) else 'none'}")


def unreadable(path: Path) -> str:
    """The error for a file or a folder that is no model."""
    where, is_folder = quoted_path(path), os.path.isdir(path)
    names = os.listdir(path) if is_folder and os.access(path, os.R_OK) else [path.name]
    if any(name.lower().endswith(".gguf") for name in names):
        return f"cannot read {where}: GGUF is not supported yet. Use the model that it was made from; {READABLE}"
    if not is_folder:
        return f"cannot read {where}: not a weight file; {READABLE}"
    if "config.json" in names:
        return f"a model's folder must hold model.safetensors or pytorch_model.bin; got neither in {where}"
    what = f"a folder without config.json or {', '.join(LOCAL_FILES)}"
    return f"model must be a name, or the path of a folder or file; got {quoted(str(path))}, {what}"


def read_json(path: Path) -> dict[str, Any]:
    """A file of a model that holds one JSON object. Raises LamaError if it is missing or is something else."""
    if not os.path.lexists(path):
        folder = "the current folder" if path.parent == Path() else quoted_path(path.parent)
        raise LamaError(f"a model must have {path.name} beside its weights; got none in {folder}. Copy it there")
    return read_object(path)


def shard_files(index: Path) -> list[Path]:
    """The files that an index lists, each once. Raises LamaError if it lists none, or one outside its folder."""
    source = quoted_path(index)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise LamaError(f"{source} must have a weight_map of tensors to files; got {quoted(names)}. {AGAIN}")
    if outside := sorted(name for name in set(names.values()) if Path(name).name != name or name in ("", "..")):
        raise LamaError(f"shards must lie beside {source}; got {quoted(outside[0])}")
    if wrong := sorted(name for name in set(names.values()) if not name.endswith((".safetensors", ".bin"))):
        raise LamaError(f"shards must be .safetensors or .bin files; got {quoted(wrong[0])} in {source}")
    return [index.parent / name for name in sorted(set(names.values()))]


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    files, source = shard_files(index), quoted_path(index)
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        got = f"{quoted(', '.join(missing), plain=True)} in {quoted_path(index.parent)}"
        raise LamaError(f"every shard that {index.name} lists must be there; got no {got}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard = open_weights(file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise LamaError(f"a tensor must be in one shard only; got {quoted(twice[0], plain=True)} in {quoted_path(file)} and in another")
        tensors |= shard
    listed = read_json(index)["weight_map"]
    if absent := sorted(listed.keys() - tensors.keys()):
        got = f"{quoted(absent[0], plain=True)}, which {listed[absent[0]]} has not"
        raise LamaError(f"{source} must list tensors that its shards hold; got {got}")
    return tensors
