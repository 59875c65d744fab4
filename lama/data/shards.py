"""A corpus in shards: texts that one process encodes together, into a file that remains if it is killed."""

import hashlib
import json
import os
import signal
import tempfile
import threading
import zipfile
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lama.atomic import atomic_write
from lama.data.corpora import Corpus
from lama.data.pieces import encode_inside_pieces, find_cut, frame_of
from lama.errors import LamaError, first_line
from lama.shapes import Array
from lama.tokenizers import Tokenizer, encode_inside, tokenizer_from_json

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

SHARD = 1 << 20  # characters of a shard, roughly
FEW = 4  # shards; fewer are not worth starting processes
TRAIN, HELD_OUT, BY_SHARE = range(3)  # where a document's tokens go

Pieces = Iterable[tuple[int, str]]
"""Pieces of text, each with the number of its document."""


@dataclass
class Shard:
    """Whole documents, or a piece of a long one."""

    source: int
    """The number of the corpus's source."""
    document: int | None = None
    """The number of the long document."""
    begins: bool = True
    ends: bool = True
    """Whether the piece begins and ends its document."""
    texts: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """TRAIN, HELD_OUT or BY_SHARE for each text."""
    size: int = 0
    """Characters."""

    def add(self, text: str, place: int = BY_SHARE) -> "Shard":
        """Append a text, and return the shard."""
        self.texts.append(text)
        self.places.append(place)
        self.size += len(text)
        return self

    def key(self) -> str:
        """A digest of everything that the ids depend on, except the tokenizer."""
        about = (self.begins, self.ends, self.places, list(map(len, self.texts)))
        content = "".join((repr(about), *self.texts))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def encode(self, tokenizer: Tokenizer, path: Path) -> None:
        """Write the ids, and the number of tokens, of bytes and the place of each text. Raises LamaError."""
        before, after = frame_of(tokenizer)
        found, lengths = array("I"), []
        for text in self.texts:
            begun = len(found)
            found.fromlist(before * self.begins)
            if len(text) <= SHARD:
                found.fromlist(encode_inside(tokenizer, text))
            else:
                pieces = (text[i : i + SHARD] for i in range(0, len(text), SHARD))
                for ids in encode_inside_pieces(tokenizer, pieces):
                    found.fromlist(ids)
                    del ids  # twice as large
            found.fromlist(after * self.ends)
            lengths.append(len(found) - begun)
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in self.texts]
        table = np.array([lengths, sizes, self.places], np.int64)
        numbers = np.frombuffer(found, np.dtype(f"u{found.itemsize}")).astype(dtype_of(tokenizer))
        with atomic_write(path) as file:
            np.savez(file, ids=numbers, table=table)


@dataclass(frozen=True)
class EncodedShard:
    """An encoded shard on the disk."""

    path: Path
    source: int
    document: int | None

    def length(self) -> int:
        """The number of tokens. Raises LamaError for a damaged file."""
        return int(self._read("table")[0][0].sum())

    def documents(self) -> Iterator[tuple[Array, int, int]]:
        """The ids of each text, its bytes, and where its tokens go. Raises LamaError for a damaged file."""
        ids, table = self._read("ids", "table")
        ends = table[0].cumsum().tolist()
        for begin, end, size, place in zip([0, *ends[:-1]], ends, *table[1:].tolist(), strict=True):
            yield ids[begin:end], size, place

    def _read(self, *names: str) -> list[Array]:
        try:
            with np.load(self.path) as arrays:
                return [arrays[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            got = f"{self.path.name}: {first_line(error)}"
            raise LamaError(f"a shard of tokens is damaged: {got}. Run the same command again") from None


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The smallest of uint8, uint16 and uint32 that holds the tokenizer's ids."""
    return np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")


def sources_of(corpus: Corpus) -> list[int]:
    """The index of each document's source."""
    counts = [count for _, count in corpus.sources] or [len(corpus.documents)]
    return [i for i, count in enumerate(counts) for _ in range(count)]


def shards_of(
    corpus: Corpus, tokenizer: Tokenizer, validation: float, watch: Callable[[Pieces], Pieces] = iter
) -> Iterator[Shard]:
    """The corpus in shards, each of one source. Raises LamaError as `Corpus.pieces` does.

    A long document is cut where its tokens allow it; `validation` is the held-out share of rows.
    """
    owners = sources_of(corpus)
    shard = Shard(0)
    pieces = ((i, piece) for i, document in enumerate(corpus.documents) for piece in document.pieces())
    for i, numbered in groupby(watch(pieces), key=itemgetter(0)):
        if shard.texts and (shard.source != owners[i] or shard.size >= SHARD):
            yield shard
            shard = Shard(owners[i])
        shard.source = owners[i]
        if corpus.documents[i].has_rows:
            for _, text in numbered:
                if shard.size >= SHARD:
                    yield shard
                    shard = Shard(owners[i])
                is_held = zlib.crc32(text.encode("utf-8", "surrogatepass")) / 2**32 < validation
                shard.add(text, HELD_OUT if is_held else TRAIN)
            continue
        rest, begins = "", True
        for _, piece in numbered:
            rest += piece
            if len(rest) > SHARD and (cut := find_cut(tokenizer, rest)):
                if shard.texts:
                    yield shard
                    shard = Shard(owners[i])
                yield Shard(owners[i], i, begins, False).add(rest[:cut])
                rest, begins = rest[cut:], False
        if begins:
            shard.add(rest)
        else:
            yield Shard(owners[i], i, begins=False).add(rest)
    if shard.texts:
        yield shard


def encoded_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    validation: float,
    watch: Callable[[Pieces], Pieces],
    digest: str,
    folder: Path,
    workers: int,
) -> Iterator[EncodedShard]:
    """Encode all shards, each into a file of `folder` unless it exists; `digest` is the tokenizer's.

    Raises LamaError for text that the tokenizer cannot spell.
    """
    shards = shards_of(corpus, tokenizer, validation, watch)
    first = deque(islice(shards, FEW))
    in_parallel = workers > 1 and len(first) == FEW
    pending: deque[tuple[EncodedShard, Future[None] | None]] = deque()

    def oldest() -> EncodedShard:
        encoded, future = pending.popleft()
        if future is not None:
            future.result()
        return encoded

    with ExitStack() as stack:
        pool = None
        while (shard := first.popleft() if first else next(shards, None)) is not None:
            path = folder / f"{digest[:16]}-{shard.key()[:32]}.npz"
            encoded = EncodedShard(path, shard.source, shard.document)
            future = None
            if not encoded.path.exists():
                if in_parallel and pool is None:
                    pool = _processes(tokenizer, workers, stack)
                if pool is None:
                    shard.encode(tokenizer, encoded.path)
                else:
                    future = pool.submit(_encode, shard, encoded.path)
            pending.append((encoded, future))
            del shard
            if len(pending) > workers:
                yield oldest()
        while pending:
            yield oldest()


def _processes(tokenizer: Tokenizer, workers: int, stack: ExitStack) -> "ProcessPoolExecutor":
    """Worker processes with the tokenizer, which they read from a folder of its files."""
    import multiprocessing  # late: importing lama stays light
    from concurrent.futures import ProcessPoolExecutor

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    tokenizer.save(folder)
    context = multiprocessing.get_context("spawn")
    start = (json.dumps(tokenizer.to_json()), folder)
    pool = stack.enter_context(ProcessPoolExecutor(workers, context, _begin, start))
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


_tokenizers: list[Tokenizer] = []  # in a worker process, its tokenizer


def _begin(spec: str, folder: Path) -> None:
    """Prepare a worker, which ends when its parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tokenizers[:] = [tokenizer_from_json(json.loads(spec), folder)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    import multiprocessing

    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _encode(shard: Shard, path: Path) -> None:
    shard.encode(_tokenizers[0], path)
