"""pytorch_model.bin and nanoGPT's ckpt.pt without PyTorch: a pickle that may name tensors, and storages read on demand.

Two formats exist. Since PyTorch 1.6 the file is a zip archive: NAME/data.pkl holds the state dict, NAME/data/KEY one
storage each. Before, four pickles in a row (a magic number, the protocol, system information, the state dict), a fifth
with the order of the storages, and then for each its length and its bytes. In both, the state dict's pickle refers to a
storage by a persistent id: ("storage", class, key, device, length, ...). nanoGPT's file holds a dict with the state dict under
"model", the model's arguments under "model_args", and an optimizer's state, whose storages nobody reads.
Source: torch/serialization.py and torch/_utils.py (described there; written anew here).
"""

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from lama.checkpoints.stored import NUMPY, StoredTensor, itemsize, read_bytes
from lama.errors import LamaError, first_line, quoted
from lama.files import LARGEST, quoted_path, read_file

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MEMO = 1 << 20  # objects that a pickle may keep to refer to; Python allocates a table for the highest number at once
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
SHARING = 8  # times as many numbers as there are in their storages that the tensors of a file may have together
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

        class LeftOut:
            """A NumPy number, such as a loss: nothing that a model needs."""

            def __init__(self, *_: Any):
                pass

            def __setstate__(self, state: Any) -> None:
                pass

        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return view
            case "torch._utils", "_rebuild_parameter":
                return parameter
            case "torch", "Size":
                return size
            case ("numpy", "dtype") | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") | ("_codecs", "encode"):
                return LeftOut
            case "torch", _ if name in STORAGES:
                return STORAGES[name]
        raise LamaError(
            f"{quoted_path(self.path)} must hold tensors only; got {quoted(f'{module}.{name}', plain=True)} in its pickle, which could "
            "run code when it is loaded. "
            "Do not load it with other tools either unless you trust its author"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, length, *rest = pid
        if kind != "storage" or dtype not in NUMPY or not isinstance(key, str) or not isinstance(length, int) or length < 0:
            raise ValueError(f"a storage that is not described by its kind, {', '.join(STORAGES)}, key and length")
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
        raise ValueError("a tensor whose storage, offset, shape and strides are not whole numbers that fit together")
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
    return read_torch(path)[0]


def read_torch(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any] | None]:
    """`open_torch`, and the `model_args` of nanoGPT's checkpoints; None of a file that is only a state dict. Raises LamaError."""
    with _explained(path):
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\3\4"
            file.seek(0)
            value, spans = (_open_zip if is_zip else _open_legacy)(path, file)
        arguments = value.get("model_args") if isinstance(value, dict) else None
        if isinstance(arguments, dict):
            value = value.get("model")
        views = _state_dict(path, value)
        storages = {view.storage.key: view.storage for view in views.values()}
        # Two tensors may share a storage, as tied ones do; thousands that do are a way to fill the memory from a small file.
        if sum(math.prod(view.shape) for view in views.values()) > SHARING * sum(storage.length for storage in storages.values()):
            raise ValueError("tensors that repeat the numbers of their storages")
    tensors = {
        name: StoredTensor(name, view.storage.dtype, view.shape, partial(_read, view, spans[view.storage.key]))
        for name, view in views.items()
    }
    return tensors, arguments if isinstance(arguments, dict) else None


def read_pickle(path: Path) -> Any:
    """The value in a pickle of plain objects, such as nanoGPT's meta.pkl. Raises LamaError."""
    with _explained(path, "pickle"):
        return _unpickled(io.BytesIO(read_file(path)), path)[0]


@contextmanager
def _explained(path: Path, what: str = "PyTorch checkpoint") -> Iterator[None]:
    """Within it, whatever a damaged file raises is one LamaError."""
    try:
        yield
    except LamaError:
        raise
    except OSError as error:
        raise LamaError(f"{quoted_path(path)} must be a readable file; got {error.strerror or first_line(error)}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything, and zipfile has many words for damaged
        raise LamaError(f"{quoted_path(path)} must be a complete {what}; got: {first_line(error)}. Download it again") from error


def _unpickled(file: io.BufferedIOBase, path: Path) -> tuple[Any, _TensorUnpickler]:
    """The value of the pickle that begins where `file` stands. Raises nearly anything."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(cast(BinaryIO, file)):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > MEMO:
            raise ValueError(f"a pickle of over {MEMO:,} objects")
    file.seek(start)
    unpickler = _TensorUnpickler(file, path)
    return unpickler.load(), unpickler


def _state_dict(path: Path, value: Any) -> dict[str, _View]:
    if not isinstance(value, dict):
        raise LamaError(f"{quoted_path(path)} must hold a state dict, tensors by name; got {type(value).__name__.lstrip('_').lower()}")
    for name, view in value.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            got = f"{type(view).__name__.lstrip('_').lower()} for {quoted(name) if isinstance(name, str | int) else type(name).__name__}"
            raise LamaError(f"{quoted_path(path)} must hold a state dict, tensors by name; got {got}")
    return value


def _open_zip(path: Path, file: io.BufferedIOBase) -> tuple[Any, dict[str, ReadSpan]]:
    with zipfile.ZipFile(file) as archive:
        if compressed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{compressed[0]} compressed, which torch.save never does")
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} files called data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("numbers in big-endian order")
        if (size := archive.getinfo(pickles[0]).file_size) > LARGEST:
            raise ValueError(f"a pickle of {size:,} bytes")
        value, unpickler = _unpickled(io.BytesIO(archive.read(pickles[0])), path)
        for storage in unpickler.storages.values():
            found, needed = archive.getinfo(f"{root}data/{storage.key}").file_size, storage.length * itemsize(storage.dtype)
            if found != needed:
                raise ValueError(f"{found} bytes instead of {needed} in storage {storage.key}")
    return value, {key: partial(_read_zip, path, f"{root}data/{key}") for key in unpickler.storages}


def _read_zip(path: Path, member: str, start: int, count: int) -> np.ndarray:
    """A span of an archive's member; one that is read from its start to its end is held against its checksum."""
    out, done = np.empty(count, np.uint8), 0
    with _explained(path):
        with zipfile.ZipFile(path) as archive, archive.open(member) as data:
            data.seek(start)
            while done < count and (block := data.read(min(1 << 20, count - done))):
                out[done : done + len(block)] = np.frombuffer(block, np.uint8)
                done += len(block)
        if done < count:
            raise ValueError(f"{done} of {count} bytes of {member}")
    return out


def _open_legacy(path: Path, file: io.BufferedIOBase) -> tuple[Any, dict[str, ReadSpan]]:
    def load() -> Any:
        return _unpickled(file, path)[0]

    if load() != MAGIC or load() != PROTOCOL:
        raise ValueError("a pickle that torch.save did not write")
    if not load()["little_endian"]:
        raise ValueError("numbers in big-endian order")
    value, unpickler = _unpickled(file, path)
    spans: dict[str, ReadSpan] = {}
    for key in load():
        storage = unpickler.storages[key]
        if (length := int.from_bytes(file.read(8), "little")) != storage.length:
            raise ValueError(f"{length} numbers instead of {storage.length} in storage {key}")
        start = file.tell()
        spans[key] = partial(_read_legacy, path, start)
        file.seek(start + length * itemsize(storage.dtype))
    if file.tell() > (size := os.fstat(file.fileno()).st_size):
        raise ValueError(f"{size} bytes where {file.tell()} were declared")
    if missing := unpickler.storages.keys() - spans.keys():
        raise ValueError(f"no storage {min(missing)}")
    return value, spans


def _read_legacy(path: Path, start: int, first: int, count: int) -> np.ndarray:
    return read_bytes(path, start + first, count)
