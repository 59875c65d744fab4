"""Random GPT-2 checkpoints in Hugging Face's formats, written with numpy alone: no lama, no PyTorch.

The initialisation is about four times GPT-2's 0.02, with biases and norms that differ, so that logits are far
from flat and every tensor matters.
"""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]  # bfloat16 as uint16

TINY = {"vocab_size": 23, "n_positions": 13, "n_embd": 10, "n_layer": 2, "n_head": 2}


def make_config(**changes: Any) -> dict[str, Any]:
    """A `config.json`: GPT-2 124M's with `changes`."""
    config: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return config | changes


def make_weights(config: Mapping[str, Any], seed: int = 0, std: float = 0.08) -> Weights:
    """All tensors of a GPT-2, float32, under Hugging Face's names without the prefix."""
    rng = np.random.default_rng(seed)
    d, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]

    def normal(*shape: int, std: float = std, mean: float = 0.0) -> np.ndarray:
        return np.float32(mean) + rng.standard_normal(shape, np.float32) * np.float32(std)

    def norm(name: str) -> Weights:
        return {f"{name}.weight": normal(d, std=0.1, mean=1.0), f"{name}.bias": normal(d, std=0.1)}

    def conv1d(name: str, n_in: int, n_out: int) -> Weights:
        return {f"{name}.weight": normal(n_in, n_out), f"{name}.bias": normal(n_out, std=0.1)}

    weights = {"wte.weight": normal(config["vocab_size"], d), "wpe.weight": normal(config["n_positions"], d)}
    for i in range(config["n_layer"]):
        weights |= (
            norm(f"h.{i}.ln_1") | conv1d(f"h.{i}.attn.c_attn", d, 3 * d) | conv1d(f"h.{i}.attn.c_proj", d, d)
        )
        weights |= (
            norm(f"h.{i}.ln_2") | conv1d(f"h.{i}.mlp.c_fc", d, inner) | conv1d(f"h.{i}.mlp.c_proj", inner, d)
        )
    weights |= norm("ln_f")
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], d)
    return weights


def with_prefix(weights: Weights) -> Weights:
    """The names that GPT2LMHeadModel saves: all but the output layer under `transformer.`."""
    return {
        name if name.startswith("lm_head") else f"transformer.{name}": value
        for name, value in weights.items()
    }


def with_masks(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """Plus the buffers that older files carry: each block's causal mask."""
    n = config["n_positions"]
    masks = {
        f"h.{i}.attn.bias": np.tri(n, dtype=np.uint8).reshape(1, 1, n, n) for i in range(config["n_layer"])
    }
    return (
        weights
        | masks
        | {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(config["n_layer"])}
    )


def to_bfloat16(weights: Weights) -> Weights:
    """Rounded to the nearest bfloat16, ties to even, as uint16."""

    def cast(x: np.ndarray) -> np.ndarray:
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    return {name: cast(value) for name, value in weights.items()}


def from_bfloat16(weights: Weights) -> Weights:
    return {name: (value.astype(np.uint32) << 16).view(np.float32) for name, value in weights.items()}


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Weights,
    write: Callable[[Path, Weights], None] | None = None,
) -> Path:
    """A model folder: config.json and the weights, as one safetensors file unless `write` does it
    otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (write or write_safetensors)(folder, weights)
    return folder


# --- safetensors

SAFE_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "uint8": "U8",
    "bool": "BOOL",
    "int64": "I64",
}


def write_safetensors(folder: Path, weights: Weights, name: str = "model.safetensors") -> None:
    """One safetensors file; uint16 arrays are written as bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, value in weights.items():
        start, end = end, end + value.nbytes
        header[key] = {
            "dtype": SAFE_DTYPES[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [start, end],
        }
    write_raw_safetensors(folder / name, header, weights.values())


def write_raw_safetensors(path: Path, header: Any, values: Any) -> None:
    """A header as given, right or wrong, and the bytes after it."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values:
            file.write(np.ascontiguousarray(value).tobytes())


def write_shards(
    folder: Path, weights: Weights, n: int = 3, stem: str = "model", suffix: str = "safetensors"
) -> None:
    """`n` files and the index that says which tensor is where."""
    names, weight_map = list(weights), {}
    for i in range(n):
        file = f"{stem}-{i + 1:05}-of-{n:05}.{suffix}"
        shard = {name: weights[name] for name in names[i::n]}
        (write_safetensors if suffix == "safetensors" else write_torch)(folder, shard, file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in weights.values())
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )


# --- torch.save's two formats. Python's own pickler writes them: `_Global` makes it emit the name of
# something in torch that need not exist here.

TORCH_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "uint16": "BFloat16Storage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "int64": "LongStorage",
}


class _Global:
    """A name to be found when the pickle is read, such as `torch.FloatStorage`."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Only what can be called may stand first in a `__reduce__`."""


class _Call:
    """Pickles as a call of `function` with `args` when the pickle is read."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class _Storage:
    """A flat array that the pickle refers to by a persistent id."""

    def __init__(self, key: str, values: np.ndarray):
        self.key, self.values = key, values


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the Python one: its `save` can be extended
    legacy = False

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = _Global("torch", TORCH_STORAGES[obj.values.dtype.name])
        return ("storage", kind, obj.key, "cpu", obj.values.size) + ((None,) if self.legacy else ())


class _LegacyPickler(_Pickler):
    legacy = True


def tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> _Call:
    """A tensor that looks at a part of a storage, as torch pickles it."""
    return _Call(
        _Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, OrderedDict()
    )


def torch_state(weights: Weights) -> tuple[Any, list[_Storage]]:
    """Each tensor with a storage of its own."""
    storages = [
        _Storage(str(i), np.ascontiguousarray(value).reshape(-1)) for i, value in enumerate(weights.values())
    ]
    strides = [
        tuple(stride // value.itemsize for stride in np.asarray(value, order="C").strides)
        for value in weights.values()
    ]
    return OrderedDict(
        (name, tensor(storage, 0, value.shape, stride))
        for (name, value), storage, stride in zip(weights.items(), storages, strides, strict=True)
    ), storages


def write_torch(folder: Path, weights: Weights, name: str = "pytorch_model.bin") -> None:
    """The format of torch.save since 1.6."""
    write_torch_zip(folder / name, *torch_state(weights))


def write_torch_zip(path: Path, state: Any, storages: list[_Storage]) -> None:
    data = io.BytesIO()
    _Pickler(data, 2).dump(state)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data.getvalue())
        archive.writestr("archive/byteorder", "little")
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.values.tobytes())
        archive.writestr("archive/version", "3\n")


def write_torch_legacy(folder: Path, weights: Weights, name: str = "pytorch_model.bin") -> None:
    """The format of torch.save before 1.6, the one of the original gpt2 files."""
    write_legacy(folder / name, *torch_state(weights))


def write_legacy(path: Path, state: Any, storages: list[_Storage]) -> None:
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(value, file, 2)
        _LegacyPickler(file, 2).dump(state)
        pickle.dump([storage.key for storage in storages], file, 2)
        for storage in storages:
            file.write(struct.pack("<q", storage.values.size) + storage.values.tobytes())
