"""GGUF files: their keys and tensors. Source: ggml-org/ggml, docs/gguf.md and src/ggml-quants.c.

Files are not trusted: every count, length, type and offset is first checked against the file's size.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lama.atomic import atomic_write
from lama.checkpoints.tensor import (
    CHUNK,
    FileTensor,
    check_finite,
    explained,
    fill_from,
    read_bytes,
    read_weights,
)
from lama.errors import LamaError, abbreviated, quoted
from lama.files import AGAIN, quoted_path
from lama.kernels.arrays import write_pairs
from lama.kernels.quantized import BLOCK, GROUP, row_sizes
from lama.shapes import Array

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes: the default alignment of a file's tensors
MOST_DIMENSIONS = 4
LONGEST_NAME = 1024  # bytes of a key or of a tensor's name; llama.cpp allows 64 for names
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # the name of a part of a split file
STRING, ARRAY, BOOL = 8, 9, 7
# The types of values: the codes of struct and of numpy.
NUMBERS = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    BOOL: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}


@dataclass(frozen=True)
class Kind:
    """A type of tensors: blocks of `numbers` in `size` bytes. A float type has no integers and no scales."""

    name: str
    numbers: int
    size: int
    integers: Callable[[Array], Array] | None = None
    """Blocks (n, size) of uint8 -> (n, numbers), int8 or uint8."""
    scales: Callable[[Array], tuple[Array, Array | None]] | None = None
    """Blocks -> the scales of their groups and, if any, the minima, (n, groups) float32 each."""
    bits: int = 0
    """The bits of lama's matrices that hold this type without rounding it again; 0 if none do."""
    halves: tuple[int, int] = (0, 0)
    """For 4 bits: the byte where a block's weights begin, and how many lower halves precede upper ones."""

    def dequantize(self, blocks: Array) -> Array:
        """(n, size) of uint8 -> (n, numbers) float32."""
        assert self.integers is not None and self.scales is not None
        scales, minima = self.scales(blocks)
        numbers = self.integers(blocks).reshape(*scales.shape, -1) * scales[..., None]
        return (numbers if minima is None else numbers + minima[..., None]).reshape(len(blocks), self.numbers)


def _half(blocks: Array, at: int) -> Array:
    """The float16 at byte `at` of each block, as (n, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """The low nibbles, then the high ones: (n, b) -> (n, 2 b)."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _neighbours(packed: Array, width: int) -> Array:
    """Repack each `width` bytes: their low nibbles, then their high ones, as pairs of adjacent weights."""
    words = np.ascontiguousarray(packed).view("<u2").reshape(-1, width // 2)
    out = np.empty((len(words), 2, width // 2), np.uint8)
    for half, nibbles in enumerate((words & 0x0F0F, words >> 4 & 0x0F0F)):
        out[:, half] = nibbles | nibbles >> 4
    return out.reshape(packed.shape)


def _fifth_bits(packed: Array) -> Array:
    """(n, 4) bytes -> (n, 32) bits, each as 16 or 0."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _one_scale(blocks: Array) -> tuple[Array, Array | None]:
    return _half(blocks, 0), None


def _scale_and_minimum(blocks: Array) -> tuple[Array, Array | None]:
    return _half(blocks, 0), _half(blocks, 2)


def _six_bits(packed: Array) -> Array:
    """Unpack eight scales, then eight minima, of 6 bits each: (n, 12) bytes -> (n, 16)."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = [low & 63, (high & 15) | (low >> 6 << 4)]
    return np.concatenate([*scales, middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)


def _scales_of_k(blocks: Array) -> tuple[Array, Array | None]:
    both = _six_bits(blocks[:, 4:16]).astype(np.float32)
    return _half(blocks, 0) * both[:, :8], -(_half(blocks, 2) * both[:, 8:])


def _scales_of_q6_k(blocks: Array) -> tuple[Array, Array | None]:
    return blocks[:, 192:208].view(np.int8) * _half(blocks, 208), None


def _pairs_of_32(packed: Array) -> Array:
    """Unpack 128 bytes: four times the low nibbles of 32 bytes, then their high ones; (n, 8, 32)."""
    groups = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(packed), 8, 32)


def _q5_k(blocks: Array) -> Array:
    bits = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & 1  # (n, 8, 32)
    return _pairs_of_32(blocks[:, 48:]) | bits << 4


def _q6_k(blocks: Array) -> Array:
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(n, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = blocks[:, 128:192].reshape(n, 2, 1, 32) >> shifts & 3  # (n, 2, 4, 32)
    return (low | high << 4).view(np.int8) - 32


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    30: Kind("BF16", 1, 2),
    8: Kind("Q8_0", 32, 34, lambda b: b[:, 2:].view(np.int8), _one_scale, 8),
    2: Kind("Q4_0", 32, 18, lambda b: _nibbles(b[:, 2:]).view(np.int8) - 8, _one_scale, 4, (2, 16)),
    3: Kind("Q4_1", 32, 20, lambda b: _nibbles(b[:, 4:]), _scale_and_minimum, 4, (4, 16)),
    6: Kind(
        "Q5_0",
        32,
        22,
        lambda b: (_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).view(np.int8) - 16,
        _one_scale,
        8,
    ),
    7: Kind("Q5_1", 32, 24, lambda b: _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _scale_and_minimum, 8),
    12: Kind("Q4_K", 256, 144, lambda b: _pairs_of_32(b[:, 16:]), _scales_of_k, 4, (16, 32)),
    13: Kind("Q5_K", 256, 176, _q5_k, _scales_of_k, 8),
    14: Kind("Q6_K", 256, 210, _q6_k, _scales_of_q6_k),
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Types that lama does not read, so that an error can name them. Source: ggml/include/ggml.h.
OTHERS = {10: "Q2_K", 11: "Q3_K", 20: "IQ4_NL", 23: "IQ4_XS", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


@dataclass(frozen=True)
class GGUF:
    """The content of a GGUF file: keys with their values, and unread tensors."""

    source: str
    """The file, for error messages."""
    keys: dict[str, object]
    """Numbers, strings, and lists of either; a list of numbers is an array of numpy."""
    tensors: dict[str, FileTensor]
    kinds: dict[str, str]
    """The type of each tensor, such as Q4_1."""


class _Reader:
    """Reads a header, with every length checked against the end of the file."""

    def __init__(self, data: mmap.mmap, source: str):
        self.data, self.source, self.at = data, source, 0

    def need(self, n: int, what: str) -> int:
        """Advance by n bytes; returns where they begin. Raises LamaError if the file has fewer."""
        start, left = self.at, len(self.data) - self.at
        if n > left:
            raise LamaError(f"{self.source} is incomplete: it has {left} of {n} bytes of {what}. {AGAIN}")
        self.at += n
        return start

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack_from(code, self.data, self.need(struct.calcsize(code), what))
        return int(value)

    def string(self, what: str, longest: int | None = None) -> str:
        n = self.number("<Q", f"the length of {what}")
        if longest is not None and n > longest:
            raise LamaError(f"{self.source}: {what} must have at most {longest} bytes; got {n}")
        start = self.need(n, what)
        try:
            return self.data[start : start + n].decode()
        except UnicodeDecodeError as error:
            got = f"got byte 0x{error.object[error.start]:02x} at offset {start + error.start}"
            raise LamaError(f"{self.source}: {what} must be UTF-8; {got}. {AGAIN}") from None

    def strings(self, n: int, what: str) -> list[str]:
        """Read n strings, fast, since a tokenizer has a hundred thousand."""
        found: list[str] = []
        at, end, length = self.at, len(self.data), struct.Struct("<Q").unpack_from
        with suppress(struct.error, UnicodeDecodeError):
            while len(found) < n:
                start = at + 8
                at = start + length(self.data, at)[0]
                if at > end:
                    break
                found.append(self.data[start:at].decode())
            else:
                self.at = at
                return found
        return [self.string(what) for _ in range(n)]  # one by one, to report the wrong one

    def value(self, kind: int, key: str) -> object:
        """The value of a key."""
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            inner, n = self.number("<I", f"the type of {key}"), self.number("<Q", f"the length of {key}")
            if inner == STRING:
                self.need(8 * n, key)  # each has at least a length
                self.at -= 8 * n
                return self.strings(n, key)
            if inner in NUMBERS:
                dtype = np.dtype(NUMBERS[inner][1])
                start = self.need(n * dtype.itemsize, key)
                return np.frombuffer(self.data[start : self.at], dtype)
            kind = inner
        if kind in NUMBERS:
            code = NUMBERS[kind][0]
            (value,) = struct.unpack_from(code, self.data, self.need(struct.calcsize(code), key))
            return value
        raise LamaError(f"{self.source}: {key} must have a known type of value; got type {kind}. {AGAIN}")


def open_gguf(path: Path) -> GGUF:
    """Open a GGUF file, or all files that it is split into; no tensor is read. Raises LamaError."""
    first = _open(path)
    count, name = first.keys.get("split.count", 1), SPLIT.fullmatch(path.name)
    if type(count) is not int or count < 2 or name is None:
        return first
    files = [path.with_name(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(1, min(count, 10_000) + 1)]
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        raise LamaError(f"{first.source} must have its other parts beside it; got no {abbreviated(missing)}")
    parts = [first if file == path else _open(file) for file in files]
    tensors: dict[str, FileTensor] = {}
    kinds: dict[str, str] = {}
    for part in parts:
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise LamaError(
                f"a tensor must be in one part only; got {quoted(twice[0])} twice in {part.source}"
            )
        tensors |= part.tensors
        kinds |= part.kinds
    return GGUF(first.source, parts[0].keys, tensors, kinds)


def _open(path: Path) -> GGUF:
    source = quoted_path(path)
    with explained(path, "GGUF file"), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise LamaError(f"{source} must be a GGUF file; got fewer than 24 bytes. {AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data, source), path)


def _read(reader: _Reader, path: Path) -> GGUF:
    source = reader.source
    start = reader.need(4, "its first bytes")
    if (magic := reader.data[start : start + 4]) != MAGIC:
        raise LamaError(f"{source} must begin with GGUF; got {quoted(magic)}. {AGAIN}")
    if (version := reader.number("<I", "the version")) not in VERSIONS:
        raise LamaError(f"{source} must be of version 2 or 3 of GGUF; got {version}")
    n_tensors, n_keys = reader.number("<Q", "the counts"), reader.number("<Q", "the counts")
    size = len(reader.data)
    for what, n, least in (("tensors", n_tensors, 24), ("keys", n_keys, 13)):
        if n * least > size:
            raise LamaError(f"{source} is incomplete: {n:,} {what} in {size:,} bytes. {AGAIN}")
    keys: dict[str, object] = {}
    for _ in range(n_keys):
        key = reader.string("a key", LONGEST_NAME)
        if key in keys:
            raise LamaError(f"{source} must have each key once; got {quoted(key)} twice. {AGAIN}")
        keys[key] = reader.value(reader.number("<I", f"the type of {quoted(key)}"), quoted(key, plain=True))
    alignment = keys.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise LamaError(
            f"{source}: general.alignment must be a power of two from 8 to 2^20; got {quoted(alignment)}"
        )
    entries: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = reader.string("the name of a tensor", LONGEST_NAME)
        if name in entries:
            raise LamaError(f"{source} must have each tensor once; got {quoted(name)} twice. {AGAIN}")
        entries[name] = _entry(reader, name)
    begin = -(-reader.at // alignment) * alignment
    _check_places(entries, alignment, size - begin, source)
    tensors = {
        name: tensor_at(path, name, kind, shape, begin + offset)
        for name, (kind, shape, offset) in entries.items()
    }
    return GGUF(source, keys, tensors, {name: kind.name for name, (kind, _, _) in entries.items()})


def _entry(reader: _Reader, name: str) -> tuple[Kind, tuple[int, ...], int]:
    """The type, shape (outermost axis first) and offset of a tensor."""
    shown = f"{reader.source}: {quoted(name, plain=True)}"
    n = reader.number("<I", "the axes of a tensor")
    if not 1 <= n <= MOST_DIMENSIONS:
        raise LamaError(f"{shown} must have 1 to {MOST_DIMENSIONS} axes; got {n}. {AGAIN}")
    shape = tuple(reader.number("<Q", "the shape of a tensor") for _ in range(n))[::-1]
    number = reader.number("<I", "the type of a tensor")
    if number not in KINDS:
        got = OTHERS.get(number, f"type {number}")
        known = ", ".join(kind.name for kind in KINDS.values())
        raise LamaError(f"{shown} must be of one of the types {known}; got {got}, which lama does not read")
    kind = KINDS[number]
    if math.prod(shape) >= 1 << 48 or 0 in shape:
        raise LamaError(f"{shown} must have a possible shape; got {quoted(shape)}. {AGAIN}")
    if shape[-1] % kind.numbers:
        rule = f"have rows of whole blocks of {kind.numbers} numbers"
        raise LamaError(f"{shown} must {rule}; got {shape[-1]}. {AGAIN}")
    return kind, shape, reader.number("<Q", "the place of a tensor")


def _check_places(
    entries: dict[str, tuple[Kind, tuple[int, ...], int]], alignment: int, size: int, source: str
) -> None:
    """Raise LamaError for tensors that are outside the file, not aligned, or overlap."""
    end, before = 0, ""
    for name, (kind, shape, offset) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        shown, n = quoted(name, plain=True), math.prod(shape) // kind.numbers * kind.size
        if offset % alignment:
            raise LamaError(
                f"{source}: {shown} must be aligned to {alignment} bytes; got offset {offset}. {AGAIN}"
            )
        if offset + n > size:
            got = f"{shown} ends at byte {offset + n:,} of {max(size, 0):,}"
            raise LamaError(f"{source} is incomplete: {got}. {AGAIN}")
        if offset < end:
            raise LamaError(f"{source}: tensors must not overlap; got {before} and {shown}. {AGAIN}")
        end, before = offset + n, shown


def tensor_at(path: Path, name: str, kind: Kind, shape: tuple[int, ...], start: int) -> FileTensor:
    """The tensor of type `kind` that begins at byte `start` of a file."""
    if kind.integers is None:
        dtype = FLOATS[kind.name]

        def read() -> Array:
            numbers = np.dtype("<f4" if dtype == "float32" else "<f2" if dtype == "float16" else "<u2")
            return read_bytes(path, start, math.prod(shape) * kind.size).view(numbers).reshape(shape)

        def read_into(first: int, out: Array) -> None:
            fill_from(path, start + first * kind.size, out)

        return FileTensor(name, dtype, shape, read, read_into=read_into)
    exact = _home(path, name, start, kind, shape) if kind.bits and len(shape) == 2 else None
    read = partial(_dequantized, path, start, kind, shape)
    return FileTensor(name, "float32", shape, read, exact=exact, stored=kind.name)


def _home(
    path: Path, name: str, start: int, kind: Kind, shape: tuple[int, ...]
) -> tuple[FileTensor, FileTensor]:
    """The values and scales of a matrix, in rows, for a `lama.kernels.Quantized`."""
    integers, in_blocks, has_minima = kind.integers, kind.numbers == 8 * GROUP, kind.scales is not _one_scale
    assert integers is not None
    rows, d_in = shape
    n = d_in // kind.numbers  # blocks of a row
    size, groups = row_sizes(d_in, kind.bits)

    def parts(out: Array) -> Iterator[tuple[Array, Array]]:
        """Some rows of `out` at a time, and their blocks, in memory that the next ones overwrite."""
        step = min(rows, max(1, CHUNK // d_in))
        # One buffer: allocating memory for each part would take longer than reading it.
        buffer = np.empty((step * n, kind.size), np.uint8)
        for row in range(0, rows, step):
            some = out[row : row + step]
            blocks = buffer[: len(some) * n]
            fill_from(path, start + row * n * kind.size, blocks)
            yield some, blocks

    def values() -> Array:
        plain = kind.bits == 4 and not has_minima  # the integers + 8 are then stored
        (at, width), used = kind.halves, d_in * kind.bits // 8
        out = np.empty((rows, size), np.uint8)
        out[:, used:] = 0x88 if plain else 0
        for some, blocks in parts(out):
            if kind.bits == 4 and write_pairs(some, blocks, at, width):
                continue
            packed = _neighbours(blocks[:, at:], width) if kind.bits == 4 else integers(blocks).view(np.uint8)
            some[:, :used] = packed.reshape(len(some), -1)
        return out.view(np.int8) if kind.bits == 8 else out

    def scales() -> Array:
        if in_blocks:
            packed: Array = np.empty((rows, groups // 8, BLOCK), np.uint8)
            for some, blocks in parts(packed):
                check_finite(np.ascontiguousarray(blocks[:, :4]).view("<f2"), "float16", name)
                each = np.concatenate([blocks[:, :4], _six_bits(blocks[:, 4:16])], axis=1)
                some[:] = each.reshape(-1, n, BLOCK)
            return packed.reshape(rows, -1)
        out: Array = np.zeros((rows, 1 + has_minima, groups), np.float16)
        for some, blocks in parts(out):
            halves = blocks.view("<f2")[:, : 1 + has_minima]
            some[:, :, :n] = halves.reshape(-1, n, 1 + has_minima).transpose(0, 2, 1)
        return out.reshape(rows, -1)

    width = groups // 8 * BLOCK if in_blocks else groups * (1 + has_minima)
    return (
        FileTensor(name, "int8" if kind.bits == 8 else "uint8", (rows, size), values),
        FileTensor(name, "uint8" if in_blocks else "float16", (rows, width), scales),
    )


def _dequantized(path: Path, start: int, kind: Kind, shape: tuple[int, ...]) -> Array:
    """All numbers of a quantised tensor as float32, read and converted in parts."""
    out: Array = np.empty(math.prod(shape), np.float32)
    step = max(1, CHUNK // kind.numbers)  # blocks
    for block in range(0, len(out) // kind.numbers, step):
        n = min(step, len(out) // kind.numbers - block)
        blocks = read_bytes(path, start + block * kind.size, n * kind.size).reshape(n, kind.size)
        with np.errstate(invalid="ignore", over="ignore"):  # `read_weights` checks for finite numbers
            out[block * kind.numbers : (block + n) * kind.numbers] = kind.dequantize(blocks).reshape(-1)
    return out.reshape(shape)


def write_gguf(path: Path, keys: Mapping[str, object], tensors: Mapping[str, tuple[str, FileTensor]]) -> None:
    """Write keys, and tensors with types such as Q8_0; the file gets its name when it is complete.

    Values are text, bool, int (uint32), float (float32), and lists of text, int (int32) or float. Quantised
    types need `FileTensor.quantized`. Raises LamaError if the file cannot be written.
    """
    numbers = {kind.name: (number, kind) for number, kind in KINDS.items()}
    head = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(keys))]
    for key, value in keys.items():
        head += [_text(key), _value(value)]
    end = 0
    for name, (kind_name, tensor) in tensors.items():
        number, kind = numbers[kind_name]
        shape = tensor.shape[::-1]
        head += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, end)]
        end += _padded(math.prod(shape) // kind.numbers * kind.size)
    header = b"".join(head)
    with atomic_write(path) as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for kind_name, tensor in tensors.values():
            data = _blocks(tensor, kind_name).reshape(-1).view(np.uint8)
            file.write(data.data)
            file.write(b"\0" * (_padded(len(data)) - len(data)))


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: object) -> bytes:
    """A value, preceded by its type."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", STRING) + _text(value)
        case [] | [str(), *_]:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(
                _text(str(each)) for each in value
            )
        case [int(), *_]:
            return struct.pack("<IIQ", ARRAY, 5, len(value)) + np.array(value, "<i4").tobytes()
    return struct.pack("<IIQ", ARRAY, 6, len(value)) + np.array(value, "<f4").tobytes()  # type: ignore[arg-type]


def _blocks(tensor: FileTensor, kind: str) -> Array:
    """The content of a tensor as it is in the file."""
    if kind in FLOATS:
        return np.ascontiguousarray(read_weights(tensor, FLOATS[kind]))
    assert tensor.quantized is not None, "a quantised type needs quantised weights"
    values, scales = (part.read() for part in tensor.quantized)
    groups = tensor.shape[1] // 32
    halves = scales[:, :groups].reshape(-1, 1).view(np.uint8)
    if kind == "Q8_0":
        return np.concatenate([halves, values[:, : groups * 32].reshape(-1, 32).view(np.uint8)], axis=1)
    packed = values[:, : groups * 16].reshape(-1, 16)  # weights 2 i and 2 i + 1 in byte i
    each = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 2, 16)
    return np.concatenate([halves, each[:, 0] | each[:, 1] << 4], axis=1)
