"""pytorch_model.bin and nanoGPT's ckpt.pt, read without PyTorch: a pickle of tensors, and their storages.

Since PyTorch 1.6 the file is a zip archive: NAME/data.pkl has the state dict, each NAME/data/KEY a storage.
Older files are five pickles: a magic number, the protocol, system information, the state dict, the order of
the storages. Then each storage's length and bytes follow. The pickle refers to a storage by a
persistent id: ("storage", class, key, device, length, ...). nanoGPT's file is a dict of "model", the state
dict, "model_args", and an optimizer's state, which is never read. Source: torch/serialization.py and
torch/_utils.py (the code here is new).
"""

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lama.checkpoints.tensor import NUMPY, FileTensor, explained, itemsize, read_bytes
from lama.errors import LamaError, quoted
from lama.files import LARGEST, quoted_path, read_file
from lama.shapes import Array

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MEMO = 1 << 20  # the most objects that a pickle may refer to; Python allocates a table for all at once
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
SHARING = 8  # the tensors of a file may have at most this many times the elements of their storages
WRONG_VIEW = "a tensor whose storage, offset, shape and strides do not fit together"
Readable: TypeAlias = io.BytesIO | io.BufferedReader
ReadSpan: TypeAlias = Callable[[int, int], Array]  # first byte, number of bytes -> uint8


@dataclass(frozen=True)
class _Storage:
    """A block of elements of one dtype. Several tensors may be views of it."""

    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: the offset of its first element in a storage, and its strides."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Builds descriptions of tensors, and refuses all other names, so that no code can run."""

    def __init__(self, file: Readable, path: Path):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        # The pickle can call only these results. They are created for each call: attributes that a hostile
        # pickle sets on them do not persist.
        def view(storage: object, offset: object, shape: object, strides: object, *_: object) -> _View:
            return _view(storage, offset, shape, strides)

        def parameter(data: object, *_: object) -> object:
            return data

        class LeftOut:
            """A NumPy number, such as a loss, which is not part of a model."""

            def __init__(self, *_: object):
                pass

            def __setstate__(self, state: object) -> None:
                pass

        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return view
            case "torch._utils", "_rebuild_parameter":
                return parameter
            case "torch", "Size":
                return tuple
            case (
                ("numpy", "dtype")
                | ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar")
                | ("_codecs", "encode")
            ):
                return LeftOut
            case "torch", _ if name in STORAGES:
                return STORAGES[name]
        got = (
            f"{quoted(f'{module}.{name}', plain=True)} in its pickle, which could run code when it is loaded"
        )
        advice = "Do not load the file with other tools either, unless you trust its author"
        raise LamaError(f"{quoted_path(self.path)} must hold tensors only; got {got}. {advice}")

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), _, int(length), *rest) if dtype in NUMPY and length >= 0:
                if rest and rest[0] is not None:
                    raise ValueError(f"storage {key} is a view of another storage")
                storage = _Storage(key, dtype, length)
                if self.storages.setdefault(key, storage) != storage:
                    raise ValueError(f"storage {key} has two descriptions")
                return storage
        raise ValueError(
            f"a storage that is not described by its kind, {', '.join(STORAGES)}, key and length"
        )


def _view(storage: object, offset: object, shape: object, strides: object) -> _View:
    """A checked view, whose elements are all inside the storage. Raises ValueError."""
    start, sizes, steps = _naturals([offset]), _naturals(shape), _naturals(strides)
    if not isinstance(storage, _Storage) or len(sizes) != len(steps):
        raise ValueError(WRONG_VIEW)
    view = _View(storage, start[0], sizes, steps)
    if view.offset + _extent(view) > storage.length:
        raise ValueError(f"a tensor of shape {sizes} reaches past the end of its storage {storage.key}")
    return view


def _naturals(values: object) -> tuple[int, ...]:
    if isinstance(values, list | tuple):
        found = tuple(n for n in values if isinstance(n, int) and n >= 0)
        if len(found) == len(values):
            return found
    raise ValueError(WRONG_VIEW)


def _extent(view: _View) -> int:
    """The number of the storage's elements from the tensor's first to its last."""
    if 0 in view.shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))


def _read(view: _View, span: ReadSpan) -> Array:
    size = itemsize(view.storage.dtype)
    elements: Array = span(view.offset * size, _extent(view) * size).view(NUMPY[view.storage.dtype])
    if 0 in view.shape:
        return elements.reshape(view.shape)
    strides = [stride * size for stride in view.strides]
    return np.lib.stride_tricks.as_strided(elements, view.shape, strides, writeable=False)


def read_torch(path: Path) -> tuple[dict[str, FileTensor], dict[str, object] | None]:
    """The tensors of a file that torch.save wrote, to be read later, and nanoGPT's `model_args` if any.

    Raises LamaError for a damaged file, and for a pickle that contains more than tensors.
    """
    arguments = None
    with explained(path, "PyTorch checkpoint"):
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\3\4"
            file.seek(0)
            value, spans = (_open_zip if is_zip else _open_legacy)(path, file)
        if isinstance(value, dict) and isinstance(value.get("model_args"), dict):
            arguments, value = value["model_args"], value.get("model")
        views = _state_dict(path, value)
        storages = {view.storage.key: view.storage for view in views.values()}
        # Tied tensors share a storage, but thousands of tensors could fill the memory from a small file.
        elements = sum(storage.length for storage in storages.values())
        if sum(math.prod(view.shape) for view in views.values()) > SHARING * elements:
            raise ValueError("tensors that repeat the numbers of their storages")
    tensors: dict[str, FileTensor] = {}
    for name, view in views.items():
        read = partial(_read, view, spans[view.storage.key])
        tensors[name] = FileTensor(name, view.storage.dtype, view.shape, read)
    return tensors, arguments


def read_pickle(path: Path) -> object:
    """The value in a pickle of plain objects, such as nanoGPT's meta.pkl. Raises LamaError."""
    with explained(path, "pickle"):
        return _unpickled(io.BytesIO(read_file(path)), path)[0]


def _unpickled(file: Readable, path: Path) -> tuple[object, _TensorUnpickler]:
    """Read a pickle at the current position of `file`. May raise almost any exception."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > MEMO:
            raise ValueError(f"a pickle of over {MEMO:,} objects")
    file.seek(start)
    unpickler = _TensorUnpickler(file, path)
    return unpickler.load(), unpickler


def _state_dict(path: Path, value: object) -> dict[str, _View]:
    must = f"{quoted_path(path)} must hold a state dict, tensors by name"
    if not isinstance(value, dict):
        raise LamaError(f"{must}; got {_kind(value)}")
    for name, view in value.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            key = quoted(name) if isinstance(name, str | int) else type(name).__name__
            raise LamaError(f"{must}; got {_kind(view)} for {key}")
    return value


def _kind(value: object) -> str:
    return type(value).__name__.lstrip("_").lower()


def _open_zip(path: Path, file: Readable) -> tuple[object, dict[str, ReadSpan]]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if compressed := [info.filename for info in members if info.compress_type != zipfile.ZIP_STORED]:
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
            found = archive.getinfo(f"{root}data/{storage.key}").file_size
            needed = storage.length * itemsize(storage.dtype)
            if found != needed:
                raise ValueError(f"{found} bytes instead of {needed} in storage {storage.key}")
    return value, {key: partial(_read_zip, path, f"{root}data/{key}") for key in unpickler.storages}


def _read_zip(path: Path, member: str, start: int, count: int) -> Array:
    """Read `count` bytes of an archive's member from `start` on. A whole member's checksum is checked."""
    out, done = np.empty(count, np.uint8), 0
    with explained(path, "PyTorch checkpoint"):
        with zipfile.ZipFile(path) as archive, archive.open(member) as data:
            data.seek(start)
            while done < count and (block := data.read(min(1 << 20, count - done))):
                out[done : done + len(block)] = np.frombuffer(block, np.uint8)
                done += len(block)
        if done < count:
            raise ValueError(f"{done} of {count} bytes of {member}")
    return out


def _open_legacy(path: Path, file: Readable) -> tuple[object, dict[str, ReadSpan]]:
    def load() -> object:
        return _unpickled(file, path)[0]

    if load() != MAGIC or load() != PROTOCOL:
        raise ValueError("a pickle that torch.save did not write")
    system = load()
    if not isinstance(system, dict) or not system["little_endian"]:
        raise ValueError("numbers in big-endian order")
    value, unpickler = _unpickled(file, path)
    spans: dict[str, ReadSpan] = {}
    order = load()
    for key in order if isinstance(order, list) else []:
        storage = unpickler.storages[key]
        if (length := int.from_bytes(file.read(8), "little")) != storage.length:
            raise ValueError(f"{length} numbers instead of {storage.length} in storage {key}")
        start = file.tell()
        spans[key] = partial(_read_legacy, path, start)
        file.seek(start + length * itemsize(storage.dtype))
    if file.tell() > (size := os.fstat(file.fileno()).st_size):
        raise ValueError(f"only {size} of {file.tell()} bytes")
    if missing := unpickler.storages.keys() - spans.keys():
        raise ValueError(f"no storage {min(missing)}")
    return value, spans


def _read_legacy(path: Path, start: int, first: int, count: int) -> Array:
    return read_bytes(path, start + first, count)
