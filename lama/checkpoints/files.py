"""The files that hold a model's tensors: which one a folder has, and one way to open them all."""

import json
from pathlib import Path

from lama.checkpoints.safetensors_files import open_safetensors
from lama.checkpoints.stored import StoredTensor
from lama.checkpoints.torch_files import open_torch
from lama.errors import LamaError

# In the order of preference: safetensors are checked more and cannot hold code.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_model_folder(folder: Path) -> bool:
    """Whether it looks like a model's folder: has a config.json or weights."""
    return folder.is_dir() and ((folder / "config.json").exists() or weight_file(folder) is not None)


def weight_file(folder: Path) -> Path | None:
    """The file in `folder` to open for its tensors: the weights themselves, or the index of their shards."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)


def all_weight_files(folder: Path) -> list[Path]:
    """That file and the shards it lists; none if one of them is not there."""
    first = weight_file(folder)
    if first is None:
        return []
    files = [first, *(shard_files(first) if first.name.endswith(".index.json") else [])]
    return files if all(file.is_file() for file in files) else []


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a `.safetensors` or `.bin` file, or of the shards that an `.index.json` lists. Raises LamaError."""
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return open_torch(path)
    raise LamaError(f"a weight file must end in .safetensors or .bin; got {path}")


def read_json(path: Path) -> dict[str, object]:
    """A file that holds one JSON object. Raises LamaError if it is missing or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LamaError(f"a model must have {path.name} beside its weights; got none in {path.parent}. Copy it there") from error
    except (OSError, ValueError) as error:
        raise LamaError(f"{path} must be a JSON file; got: {error}. Download or copy it again") from error
    if not isinstance(value, dict):
        raise LamaError(f"{path} must hold a JSON object; got {type(value).__name__}. Download or copy it again")
    return value


def shard_files(index: Path) -> list[Path]:
    """The files that an index lists, each once. Raises LamaError if it lists none, or one outside its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise LamaError(f"{index} must have a weight_map of tensors to files; got {str(names)[:60]}. Download or copy it again")
    if outside := sorted(name for name in set(names.values()) if Path(name).name != name or name in ("", "..")):
        raise LamaError(f"shards must lie beside {index}; got {outside[0]!r}")
    if wrong := sorted(name for name in set(names.values()) if not name.endswith((".safetensors", ".bin"))):
        raise LamaError(f"shards must be .safetensors or .bin files; got {wrong[0]!r} in {index}")
    return [index.parent / name for name in sorted(set(names.values()))]


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    files = shard_files(index)
    if missing := [file.name for file in files if not file.exists()]:
        raise LamaError(f"every shard that {index.name} lists must be there; got no {', '.join(missing)} in {index.parent}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard = open_weights(file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise LamaError(f"a tensor must be in one shard only; got {twice[0]} in {file.name} and in another of {index.parent}")
        tensors |= shard
    listed: dict[str, str] = read_json(index)["weight_map"]  # type: ignore[assignment]
    if absent := sorted(listed.keys() - tensors.keys()):
        raise LamaError(f"{index} must list tensors that its shards hold; got {absent[0]}, which {listed[absent[0]]} has not")
    return tensors
