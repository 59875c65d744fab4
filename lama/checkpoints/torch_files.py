"""pytorch_model.bin without PyTorch: a pickle that may name tensors and nothing else, and storages read on demand.

Two formats exist. Since PyTorch 1.6 the file is a zip archive: NAME/data.pkl holds the state dict, NAME/data/KEY one
storage each. Before, four pickles in a row (a magic number, the protocol, system information, the state dict), a fifth
with the order of the storages, and then for each its length and its bytes. In both, the state dict's pickle refers to a
storage by a persistent id: ("storage", class, key, device, length, ...).
Source: torch/serialization.py and torch/_utils.py (described there; written anew here).
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lama.checkpoints.stored import NUMPY, StoredTensor, itemsize, read_bytes
from lama.errors import LamaError, first_line

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ReadSpan = Callable[[int, int], np.ndarray]  # first byte, number of bytes -> uint8


@dataclass(frozen=True)
class _Storage:
    """One block of numbers of one dtype; several tensors may look at it."""

    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: where in a storage it starts and how far apart its numbers lie."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors' descriptions, and refuses every name that such a file does not need: it can run no code."""

    def __init__(self, file: io.BufferedIOBase, path: Path):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        # What is returned here is all that the pickle can call. Closures made for this one file: whatever a hostile
        # pickle sets on them is gone with it.
        def view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
            return _view(storage, offset, shape, strides)

        def parameter(data: Any, *_: Any) -> Any:
            return data

        def size(shape: Any = ()) -> tuple[int, ...]:
            return tuple(shape)

        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return view
            case "torch._utils", "_rebuild_parameter":
                return parameter
            case "torch", "Size":
                return size
            case "torch", _ if name in STORAGES:
                return STORAGES[name]
        raise LamaError(
            f"{self.path} must hold tensors only; got {module}.{name} in its pickle, which could run code when it is loaded. "
            "Do not load it with other tools either unless you trust its author"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, length, *rest = pid
        if kind != "storage" or dtype not in NUMPY or not isinstance(key, str) or not isinstance(length, int) or length < 0:
            raise ValueError(f"unknown storage {pid!r:.80}")
        if rest and rest[0] is not None:
            raise ValueError(f"storage {key} is a view of another storage")
        storage = _Storage(key, dtype, length)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} has two descriptions")
        return storage


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> _View:
    """A checked view: every number lies inside the storage. Raises ValueError."""
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise ValueError(f"a tensor at {offset!r:.20} with shape {shape!r:.40} and strides {strides!r:.40}")
    view = _View(storage, offset, tuple(shape), tuple(strides))
    if offset + _extent(view) > storage.length:
        raise ValueError(f"a tensor of shape {view.shape} reaches past the end of its storage {storage.key}")
    return view


def _extent(view: _View) -> int:
    """How many numbers of the storage lie between the tensor's first and last, both included."""
    return 0 if 0 in view.shape else 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))


def _read(view: _View, span: ReadSpan) -> np.ndarray:
    size = itemsize(view.storage.dtype)
    numbers = span(view.offset * size, _extent(view) * size).view(NUMPY[view.storage.dtype])
    if 0 in view.shape:
        return numbers.reshape(view.shape)
    return np.lib.stride_tricks.as_strided(numbers, view.shape, [stride * size for stride in view.strides], writeable=False)


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that torch.save wrote, by name; numbers are read later, one tensor at a time.

    Raises LamaError if the file is truncated or damaged, or its pickle names anything that is not part of a tensor.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\3\4"
            file.seek(0)
            views, spans = (_open_zip if is_zip else _open_legacy)(path, file)
    except LamaError:
        raise
    except OSError as error:
        raise LamaError(f"{path} must be a readable file; got {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise LamaError(f"{path} must be a complete PyTorch checkpoint; got: {first_line(error)}. Download it again") from error
    return {
        name: StoredTensor(name, view.storage.dtype, view.shape, partial(_read, view, spans[view.storage.key]))
        for name, view in views.items()
    }


def _state_dict(path: Path, value: Any) -> dict[str, _View]:
    if not isinstance(value, dict):
        raise LamaError(f"{path} must hold a state dict, tensors by name; got {type(value).__name__.lstrip('_').lower()}")
    for name, view in value.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise LamaError(f"{path} must hold a state dict, tensors by name; got {type(view).__name__} for {name!r:.40}")
    return value


def _open_zip(path: Path, file: io.BufferedIOBase) -> tuple[dict[str, _View], dict[str, ReadSpan]]:
    with zipfile.ZipFile(file) as archive:
        if compressed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{compressed[0]} compressed, which torch.save never does")
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} files called data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("numbers in big-endian order")
        unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), path)
        views = _state_dict(path, unpickler.load())
        for storage in unpickler.storages.values():
            found, needed = archive.getinfo(f"{root}data/{storage.key}").file_size, storage.length * itemsize(storage.dtype)
            if found != needed:
                raise ValueError(f"{found} bytes instead of {needed} in storage {storage.key}")
    return views, {key: partial(_read_zip, path, f"{root}data/{key}") for key in unpickler.storages}


def _read_zip(path: Path, member: str, start: int, count: int) -> np.ndarray:
    """A span of an archive's member; one that is read from its start to its end is held against its checksum."""
    out = np.empty(count, np.uint8)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as data:
            data.seek(start)
            done = 0
            while done < count and (block := data.read(min(1 << 20, count - done))):
                out[done : done + len(block)] = np.frombuffer(block, np.uint8)
                done += len(block)
    except Exception as error:  # zipfile has many words for damaged
        raise LamaError(f"{path} must be a complete PyTorch checkpoint; got: {first_line(error)}. Download it again") from error
    if done < count:
        raise LamaError(f"{path} must be a complete PyTorch checkpoint; got {done} of {count} bytes of {member}. Download it again")
    return out


def _open_legacy(path: Path, file: io.BufferedIOBase) -> tuple[dict[str, _View], dict[str, ReadSpan]]:
    def load() -> Any:
        return _TensorUnpickler(file, path).load()

    if load() != MAGIC or load() != PROTOCOL:
        raise ValueError("a pickle that torch.save did not write")
    if not load()["little_endian"]:
        raise ValueError("numbers in big-endian order")
    unpickler = _TensorUnpickler(file, path)
    views = _state_dict(path, unpickler.load())
    spans: dict[str, ReadSpan] = {}
    for key in load():
        storage = unpickler.storages[key]
        if (length := int.from_bytes(file.read(8), "little")) != storage.length:
            raise ValueError(f"{length} numbers instead of {storage.length} in storage {key}")
        start = file.tell()
        spans[key] = partial(_read_legacy, path, start)
        file.seek(start + length * itemsize(storage.dtype))
    if file.tell() > path.stat().st_size:
        raise ValueError(f"{path.stat().st_size} bytes where {file.tell()} were declared")
    if missing := unpickler.storages.keys() - spans.keys():
        raise ValueError(f"no storage {min(missing)}")
    return views, spans


def _read_legacy(path: Path, start: int, first: int, count: int) -> np.ndarray:
    return read_bytes(path, start + first, count)
