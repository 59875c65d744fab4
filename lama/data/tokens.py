"""A corpus as token ids on the disk: made once, then read through memory maps, so its size does not matter."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lama.data.corpora import Corpus, last_boundary
from lama.errors import LamaError, UsageError
from lama.files import read_object
from lama.tokenizers import Tokenizer, encode_inside
from lama.tokenizers.base import WHITE, TableTokenizer

TYPES = ("uint8", "uint16", "uint32")
PARTS = ("train", "validation")
META = "meta.json"
BLOCK = 1 << 18  # tokens copied at a time
AHEAD = 1 << 15  # characters after a cut that must show that no token depends on both sides; no added token is as long
CUTS = 64  # places tried before more text is read


@dataclass(frozen=True)
class TokenFiles:
    """The two parts of a corpus as token ids, and what they came from. The arrays are memory maps: reading them reads the disk."""

    folder: Path
    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    train_bytes: int
    validation_bytes: int
    """UTF-8 bytes of the text of each part, for losses per byte; the tokens between documents count as none."""
    corpus: Mapping[str, str]
    """Its name, provenance and licence."""
    text_digest: str
    """`Corpus.digest()` of the text."""
    tokenizer_digest: str
    """`fingerprint` of the tokenizer."""
    digest: str
    """SHA-256 over those of the two files: other tokens, another digest."""


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    validation: float = 0.1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TokenFiles:
    """Write the corpus into `folder`: train.bin, validation.bin (little-endian, 1, 2 or 4 bytes a token), meta.json.

    Of every document the last `validation` of its tokens are held out. Between two documents stands the tokenizer's
    end_of_text, if it has one. The text is read, encoded and written in pieces; `progress` may watch them as they come.
    Files of that name are replaced once all is written, meta.json last. Raises UsageError for a share that is none,
    LamaError for text that the tokenizer cannot spell and for a folder that cannot be written.
    """
    if not 0 < validation < 1:
        raise UsageError(f"validation must be a share between 0 and 1; got validation={validation}")
    folder = Path(folder)
    paths = [folder / f"{part}.bin" for part in PARTS]
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (*paths, folder / META)]
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    with _writing(folder, temporary):
        with ExitStack() as stack:
            train, heldout = (stack.enter_context(open(path, "w+b")) for path in temporary[:2])
            heldout_bytes = _write(corpus, tokenizer, train, heldout, validation, dtype.newbyteorder("<"), progress)
        counts = [path.stat().st_size // dtype.itemsize for path in temporary[:2]]
        meta = {
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokens": dict(zip(PARTS, counts, strict=True)),
            "bytes": {"train": corpus.n_bytes - heldout_bytes, "validation": heldout_bytes},
            "sha256": {part: _sha256(path) for part, path in zip(PARTS, temporary, strict=False)},
            "corpus": {"name": corpus.name, "provenance": corpus.provenance, "licence": corpus.licence},
            "text_sha256": corpus.digest(),
            "tokenizer_sha256": fingerprint(tokenizer),
        }
        temporary[2].write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for path in temporary:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        (folder / META).unlink(missing_ok=True)  # or else it would speak of other files, if this were to end here
        for path, target in zip(temporary, (*paths, folder / META), strict=True):
            os.replace(path, target)
    return open_tokens(folder)


def open_tokens(folder: Path, verify: bool = False) -> TokenFiles:
    """The files that `tokenize` wrote, mapped read-only. With `verify` they are read through and held against their hashes.

    Raises LamaError for files that are missing, cut short, or not what meta.json says.
    """
    folder = Path(folder)
    again = "Tokenise the corpus again"
    try:
        os.stat(folder / META)  # one that is missing is named beside the others
        meta = read_object(folder / META)
        if meta["dtype"] not in TYPES:
            raise ValueError(f"dtype {meta['dtype']!r}")
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        for part in PARTS:
            path, wanted = folder / f"{part}.bin", int(meta["tokens"][part]) * dtype.itemsize
            if (size := path.stat().st_size) != wanted:
                raise LamaError(f"{path} must have {wanted} bytes, as {META} says; got {size}. {again}")
            if verify and (found := _sha256(path)) != meta["sha256"][part]:
                raise LamaError(f"{path} must have SHA-256 {meta['sha256'][part]}, as {META} says; got {found}. {again}")
        return TokenFiles(
            folder,
            train=_map(folder / "train.bin", dtype),
            validation=_map(folder / "validation.bin", dtype),
            vocab_size=int(meta["vocab_size"]),
            train_bytes=int(meta["bytes"]["train"]),
            validation_bytes=int(meta["bytes"]["validation"]),
            corpus={name: str(meta["corpus"][name]) for name in ("name", "provenance", "licence")},
            text_digest=str(meta["text_sha256"]),
            tokenizer_digest=str(meta["tokenizer_sha256"]),
            digest=hashlib.sha256("".join(meta["sha256"][part] for part in PARTS).encode()).hexdigest(),
        )
    except OSError as error:
        raise LamaError(
            f"{folder} must hold train.bin, validation.bin and {META}; got {error.filename}: {error.strerror}. {again}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise LamaError(f"{folder / META} must be as lama writes it; got {type(error).__name__}: {error}. {again}") from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that a checkpoint keeps of a tokenizer: equal ones give equal ids."""
    digest = hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"\n{path.relative_to(folder).as_posix()} {_sha256(path)}".encode())
    return digest.hexdigest()


@contextmanager
def _writing(folder: Path, temporary: Iterable[Path]) -> Iterator[None]:
    """The folder is there, and in the end the temporary files are gone. Raises LamaError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise LamaError(f"{folder} must be a folder that can be written; got {error.strerror or error}") from error


def _write(
    corpus: Corpus,
    tokenizer: Tokenizer,
    train: BinaryIO,
    heldout: BinaryIO,
    validation: float,
    dtype: np.dtype,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> int:
    """All of each document goes to `train`, then its last part from there to `heldout`. Returns the bytes of text there."""
    separator = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    heldout_bytes = 0
    pieces = ((i, piece) for i, document in enumerate(corpus.documents) for piece in document.pieces())
    for i, numbered in groupby(progress(pieces), key=itemgetter(0)):
        if i > 0:
            train.write(np.array(separator, dtype).tobytes())
            heldout.write(np.array(separator, dtype).tobytes())
        start = train.tell()
        for some in map(partial(np.array, dtype=dtype), encode_pieces(tokenizer, (piece for _, piece in numbered))):
            train.write(some.tobytes())  # by now the list is gone, which is eight times as large
        n = (train.tell() - start) // dtype.itemsize
        end = start + int(n * (1 - validation)) * dtype.itemsize
        train.seek(end)
        while block := train.read(BLOCK * dtype.itemsize):
            heldout.write(block)
            heldout_bytes += len(tokenizer.decode_bytes(np.frombuffer(block, dtype).tolist()))
        train.seek(end)
        train.truncate()
    return min(heldout_bytes, corpus.n_bytes)  # decoding may give more than was read: a frame, spaces between words


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """The ids of a text that comes in pieces, some at a time; together those of `tokenizer.encode` of the whole.

    Wherever a piece ends, ids are given only up to a cut after which the text has the same ids alone as it has with the
    text before, for `AHEAD` characters. Raises LamaError for text that cannot be spelled.
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
    """The ids before a cut, and the text after it; none and all of the text where no cut is found.

    A cut never follows white space: an added token may take in any amount of it.
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


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)  # nothing cannot be mapped


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
