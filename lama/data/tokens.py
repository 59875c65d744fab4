"""A corpus as token ids on the disk, written once and read through memory maps, so it may be large."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lama.atomic import atomic_folder, write_atomically
from lama.data.corpora import Corpus, last_boundary
from lama.errors import LamaError, UsageError, first_line
from lama.files import read_object
from lama.shapes import Array
from lama.tokenizers import Tokenizer, encode_inside
from lama.tokenizers.base import WHITE, TableTokenizer

TYPES = ("uint8", "uint16", "uint32")
PARTS = ("train", "validation")
META = "meta.json"
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""A function around the pieces of a text, which may watch them."""
BLOCK = 1 << 18  # tokens copied at a time
# Characters after a cut on which the tokens are compared; no added token is as long.
AHEAD = 1 << 15
CUTS = 64  # positions tried before more text is read


@dataclass(frozen=True)
class TokenFiles:
    """The two parts of a corpus as token ids, memory-mapped, and their origin."""

    folder: Path
    train: Array
    validation: Array
    vocab_size: int
    validation_bytes: int
    """UTF-8 bytes of the validation text, for losses per byte, without the tokens between documents."""
    corpus: Mapping[str, str]
    """The corpus's name, provenance and licence."""
    text_digest: str
    """`Corpus.digest()` of the text."""
    tokenizer_digest: str
    """`fingerprint` of the tokenizer."""
    digest: str
    """SHA-256 of the two files' SHA-256."""


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    validation: float = 0.1,
    progress: Progress = iter,
) -> TokenFiles:
    """Write train.bin and validation.bin (little-endian, 1, 2 or 4 bytes a token) and meta.json in `folder`.

    The last `validation` of each document's tokens are held out. The tokenizer's end_of_text, if it has one,
    separates documents. `progress` may watch the pieces of the text. Old files are replaced when all is
    written, meta.json last. Raises UsageError for a share out of range, LamaError for text that the tokenizer
    cannot spell and for a folder that cannot be written.
    """
    if not 0 < validation < 1:
        raise UsageError(f"validation must be a share between 0 and 1; got validation={validation}")
    folder, dtype = Path(folder), np.min_scalar_type(tokenizer.vocab_size - 1)
    with atomic_folder(folder) as place:
        paths = [place / f"{part}.bin" for part in PARTS]
        with open(paths[0], "w+b") as train, open(paths[1], "w+b") as heldout:
            small = dtype.newbyteorder("<")
            heldout_bytes = _write(corpus, tokenizer, train, heldout, validation, small, progress)
            for file in (train, heldout):
                file.flush()
                os.fsync(file.fileno())
        counts = [path.stat().st_size // dtype.itemsize for path in paths]
        meta = {
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokens": dict(zip(PARTS, counts, strict=True)),
            "bytes": {"train": corpus.n_bytes - heldout_bytes, "validation": heldout_bytes},
            "sha256": dict(zip(PARTS, map(_sha256, paths), strict=True)),
            "corpus": {"name": corpus.name, "provenance": corpus.provenance, "licence": corpus.licence},
            "text_sha256": corpus.digest(),
            "tokenizer_sha256": fingerprint(tokenizer),
        }
        write_atomically(place / META, f"{json.dumps(meta, ensure_ascii=False, indent=1)}\n".encode())
        # If this ended while the files move, it would describe others.
        (folder / META).unlink(missing_ok=True)
    return open_tokens(folder)


def open_tokens(folder: Path, verify: bool = False) -> TokenFiles:
    """Map the files that `tokenize` wrote; with `verify`, compare their hashes first.

    Raises LamaError for files that are missing, cut short, or different from what meta.json says.
    """
    folder = Path(folder)
    again = "Tokenise the corpus again"
    try:
        os.stat(folder / META)  # one that is missing is named beside the others
        meta: dict[str, Any] = read_object(folder / META)
        if meta["dtype"] not in TYPES:
            raise ValueError(f"dtype {meta['dtype']!r}")
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        for part in PARTS:
            path, wanted = folder / f"{part}.bin", int(meta["tokens"][part]) * dtype.itemsize
            if (size := path.stat().st_size) != wanted:
                raise LamaError(f"{path} must have {wanted} bytes, as {META} says; got {size}. {again}")
            hash_ = meta["sha256"][part]
            if verify and (found := _sha256(path)) != hash_:
                raise LamaError(f"{path} must have SHA-256 {hash_}, as {META} says; got {found}. {again}")
        return TokenFiles(
            folder,
            train=_map(folder / "train.bin", dtype),
            validation=_map(folder / "validation.bin", dtype),
            vocab_size=int(meta["vocab_size"]),
            validation_bytes=int(meta["bytes"]["validation"]),
            corpus={name: str(meta["corpus"][name]) for name in ("name", "provenance", "licence")},
            text_digest=str(meta["text_sha256"]),
            tokenizer_digest=str(meta["tokenizer_sha256"]),
            digest=hashlib.sha256("".join(meta["sha256"][part] for part in PARTS).encode()).hexdigest(),
        )
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
        files = f"train.bin, validation.bin and {META}"
        raise LamaError(f"{folder} must hold {files}; got {found}. {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise LamaError(f"{folder / META} must be as lama writes it; got {found}. {again}") from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that a checkpoint has of a tokenizer; equal ones give equal ids."""
    digest = hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"\n{path.relative_to(folder).as_posix()} {_sha256(path)}".encode())
    return digest.hexdigest()


def _write(
    corpus: Corpus,
    tokenizer: Tokenizer,
    train: BinaryIO,
    heldout: BinaryIO,
    validation: float,
    dtype: np.dtype,
    progress: Progress,
) -> int:
    """Write each document to `train`, move its last part to `heldout`, and return the bytes of that text."""
    end_of_text = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    separator, heldout_bytes = np.array(end_of_text, dtype).tobytes(), 0
    pieces = ((i, piece) for i, document in enumerate(corpus.documents) for piece in document.pieces())
    for i, numbered in groupby(progress(pieces), key=itemgetter(0)):
        if i > 0:
            train.write(separator)
            heldout.write(separator)
        start = train.tell()
        ids = encode_pieces(tokenizer, (piece for _, piece in numbered))
        for some in map(partial(np.array, dtype=dtype), ids):
            train.write(some.tobytes())  # the list, eight times as large, has been freed
        n = (train.tell() - start) // dtype.itemsize
        end = start + int(n * (1 - validation)) * dtype.itemsize
        train.seek(end)
        while block := train.read(BLOCK * dtype.itemsize):
            heldout.write(block)
            heldout_bytes += len(tokenizer.decode_bytes(np.frombuffer(block, dtype).tolist()))
        train.seek(end)
        train.truncate()
    # Decoding may add text: a frame, spaces between words.
    return min(heldout_bytes, corpus.n_bytes)


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """The ids of `tokenizer.encode` for a text that comes in pieces, some at a time.

    Ids are given up to a cut after which the text has the same ids without the text before it, for `AHEAD`
    characters. Raises LamaError for text that cannot be spelled.
    """
    whole = tokenizer if isinstance(tokenizer, TableTokenizer) else None
    before, after = whole.frame if whole else ((), ())
    yield list(before)
    rest, least = "", AHEAD
    for piece in pieces:
        rest += piece
        if len(rest) > least:
            ids, rest = _encode_to_cut(tokenizer, rest)
            yield ids
            del ids
            least = max(AHEAD, 2 * len(rest))
    yield [*encode_inside(tokenizer, rest), *after]


def _encode_to_cut(tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    """The ids before a cut, and the text after it; no ids and all text where no cut is found.

    A cut never follows white space, since an added token may include any amount of it.
    """
    ids, end = encode_inside(tokenizer, text), len(text) - AHEAD
    for place in (last_boundary(text[:end]), *range(end, max(0, end - CUTS), -1)):
        if text[place - 1] not in WHITE:
            tail = encode_inside(tokenizer, text[place:])
            n = len(ids) - len(tail)
            if n >= 0 and ids[n:] == tail:
                del ids[n:]
                return ids, text[place:]
    return [], text


def _map(path: Path, dtype: np.dtype) -> Array:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
