"""A corpus as token ids on the disk, written once and read through memory maps, so that it may be large.

A folder has train.bin and validation.bin, the ids; *.ends.bin, the ends of the documents in them; and
meta.json, which describes them. For conversations, *.counted.bin says whether a token counts in the loss.
"""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lama.atomic import atomic_folder, write_atomically
from lama.data.corpora import META, Corpus
from lama.data.shards import BY_SHARE, HELD_OUT, EncodedShard, dtype_of, encoded_shards, sources_of
from lama.errors import LamaError, UsageError, first_line
from lama.files import field as field_of
from lama.files import quoted_path, read_object
from lama.host import cores
from lama.shapes import Array
from lama.tokenizers import Tokenizer, tokenizer_from_json

TYPES = ("uint8", "uint16", "uint32")
PARTS = ("train", "validation")
FILES = tuple(f"{part}{name}.bin" for part in PARTS for name in ("", ".ends", ".counted"))
SHARDS = ".shards"
BLOCK = 1 << 18  # tokens that are decoded at a time
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""A function that passes on the pieces of a text, and may show progress."""


@dataclass(frozen=True)
class TokenFiles:
    """The two parts of a corpus as token ids, memory-mapped, and their origin."""

    folder: Path
    train: Array
    validation: Array
    vocab_size: int
    validation_bytes: int
    """UTF-8 bytes of the held-out text, for losses per byte; tokens between documents do not count."""
    n_bytes: int
    """UTF-8 bytes of the text."""
    corpus: Mapping[str, str]
    """The corpus's name, provenance and licence."""
    text_digest: str
    """`Corpus.digest()` of the text."""
    tokenizer_digest: str
    """`fingerprint` of the tokenizer."""
    digest: str
    """SHA-256 of the files' SHA-256."""
    ends: Mapping[str, Array] = field(default_factory=dict)
    """The ends of the documents in each part, (n,) int64; empty for files of earlier versions."""
    counted: Mapping[str, Array] = field(default_factory=dict)
    """For conversations, whether each token of a part counts in the loss, (n,) uint8."""
    sources: Sequence[int] = ()
    """The ends of the corpus's sources in `train`."""
    notes: Mapping[str, object] = field(default_factory=dict)
    """For conversations: their number, and how many were cut or dropped."""


class TokenWriter:
    """Writes the files of a `TokenFiles` into a folder, one document after the other."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, counted: bool = False):
        """`counted`: whether documents have marks of the tokens that count in the loss."""
        self.folder, self.tokenizer = folder, tokenizer
        self.dtype, end = dtype_of(tokenizer), tokenizer.end_of_text
        self._separator = b"" if end is None or counted else np.array([end], self.dtype).tobytes()
        self.tokens = dict.fromkeys(PARTS, 0)
        self._ends = {part: array("q") for part in PARTS}
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._ids = {part: self._create(f"{part}.bin") for part in PARTS}
        self._counted = {part: self._create(f"{part}.counted.bin") for part in PARTS if counted}

    def _create(self, name: str) -> BinaryIO:
        file = open(self.folder / name, "wb")  # noqa: SIM115  (until `close`)
        self._files[name] = self._open.enter_context(file)
        return file

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def add(
        self, part: str, ids: Array, counted: Array | None = None, begins: bool = True, ends: bool = True
    ) -> None:
        """Write a document, or a piece of one; `begins` and `ends`: whether it is the first or last piece."""
        content = ids.astype(self.dtype, copy=False).tobytes()
        if begins and self._ends[part]:
            content = self._separator + content
        self._ids[part].write(content)
        if counted is not None:
            self._counted[part].write(counted.astype(np.uint8).tobytes())
        self.tokens[part] += len(content) // self.dtype.itemsize
        if ends:
            self._ends[part].append(self.tokens[part])

    def finish(self, corpus: Corpus, digest: str, meta: Mapping[str, object]) -> None:
        """Write the ends and meta.json. `digest` is the text's, and `meta` has the bytes of both parts."""
        for part in PARTS:
            self._create(f"{part}.ends.bin").write(np.array(self._ends[part], "<i8").tobytes())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        about = {
            "dtype": self.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            "tokens": self.tokens,
            "documents": {part: len(self._ends[part]) for part in PARTS},
            "sha256": {name.removesuffix(".bin"): _sha256(self.folder / name) for name in self._files},
            "corpus": {"name": corpus.name, "provenance": corpus.provenance, "licence": corpus.licence},
            "text_sha256": digest,
            "tokenizer_sha256": fingerprint(self.tokenizer),
            **meta,
        }
        write_atomically(self.folder / META, f"{json.dumps(about, ensure_ascii=False, indent=1)}\n".encode())


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    validation: float = 0.1,
    progress: Progress = iter,
    workers: int | None = None,
    keep_tokenizer: bool = False,
) -> TokenFiles:
    """Write the files of a `TokenFiles` in `folder`; ids are little-endian, of 1, 2 or 4 bytes.

    The last `validation` of a file's tokens is held out; of a file of rows, about that share of the texts.
    Equal texts are in the same part. The tokenizer's end_of_text, if it has one, separates documents.

    `workers` processes (default: one for each processor) encode a large corpus in shards. If the process is
    killed, these stay in the folder, and the next call uses those of the same text. `progress` may watch the
    pieces of the text. With `keep_tokenizer` the folder also gets the tokenizer, for `own_tokenizer`. Old
    files are replaced when all new ones are written, meta.json last. Raises UsageError for a share out of
    range, LamaError for text that the tokenizer cannot spell and for a folder that cannot be written.
    """
    if not 0 < validation < 1:
        raise UsageError(f"validation must be a share between 0 and 1; got validation={validation}")
    folder = Path(folder)
    with atomic_folder(folder) as place:
        shards = folder / SHARDS
        shards.mkdir(exist_ok=True)
        facts, names = _Facts(corpus), [name for name, _ in corpus.sources] or [corpus.name]
        kept = (fingerprint(tokenizer), shards, workers or cores())
        with closing(TokenWriter(place, tokenizer)) as writer:
            ends = [0] * len(names)
            try:
                encoded = encoded_shards(corpus, tokenizer, validation, facts.watch(progress), *kept)
                held_bytes = min(_join(encoded, writer, validation, ends), facts.bytes)
            except LamaError:
                shutil.rmtree(shards, ignore_errors=True)
                raise
            except BrokenExecutor:
                advice = "Fewer processes need less memory; the same command continues"
                raise LamaError(f"the system ended a process that encodes text. {advice}") from None
            *digests, digest = facts.digests
            known = zip(names, digests, ends, strict=True)
            meta: dict[str, object] = {
                "bytes": {"train": facts.bytes - held_bytes, "validation": held_bytes},
                "sources": [{"name": name, "sha256": hash_, "end": end} for name, hash_, end in known],
            }
            if keep_tokenizer:
                tokenizer.save(place)
                meta["tokenizer"] = tokenizer.to_json()
            writer.finish(corpus, digest, meta)
        # Otherwise it would describe other files if the process ends while these are moved.
        (folder / META).unlink(missing_ok=True)
    shutil.rmtree(shards, ignore_errors=True)
    return open_tokens(folder)


class _Facts:
    """The bytes and digest of a corpus and the digests of its sources, collected as it is read."""

    def __init__(self, corpus: Corpus):
        self.owners = sources_of(corpus)
        self.bytes = 0
        self._sources = [hashlib.sha256() for _ in corpus.sources or [0]]
        self._whole = hashlib.sha256() if corpus.sources else self._sources[0]

    def watch(self, progress: Progress) -> Progress:
        """A function like `progress` that also collects the facts of the pieces."""

        def watched(pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
            for document, piece in progress(pieces):
                content = piece.encode("utf-8", "surrogatepass")
                self.bytes += len(content)
                self._whole.update(content)
                if (source := self._sources[self.owners[document]]) is not self._whole:
                    source.update(content)
                yield document, piece

        return watched

    @property
    def digests(self) -> list[str]:
        """The digests of the sources, then that of the whole corpus."""
        return [digest.hexdigest() for digest in (*self._sources, self._whole)]


def open_tokens(folder: Path, verify: bool = False) -> TokenFiles:
    """Map the files that `tokenize` wrote; with `verify`, compare their hashes first.

    Raises LamaError for files that are missing, cut short, or different from what meta.json says.
    """
    folder = Path(folder)
    again = "Tokenise the corpus again"
    try:
        os.stat(folder / META)  # if it is missing, the error below names all three files
        meta: dict[str, Any] = read_object(folder / META)
        if "at" in meta:
            return _linked(meta, verify)
        if meta["dtype"] not in TYPES:
            raise ValueError(f"dtype {meta['dtype']!r}")
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        arrays: dict[str, dict[str, Array]] = {"": {}, "ends": {}, "counted": {}}
        for name, hash_ in meta["sha256"].items():
            part, _, kind = name.partition(".")
            path = folder / f"{name}.bin"
            type_ = {"ends": np.dtype("<i8"), "": dtype}.get(kind, np.dtype("u1"))
            if path.name not in FILES:
                raise ValueError(f"a file {path.name!r}")
            count = int(meta["documents" if kind == "ends" else "tokens"][part])
            if (size := path.stat().st_size) != (wanted := count * type_.itemsize):
                raise LamaError(f"{path} must have {wanted} bytes, as {META} says; got {size}. {again}")
            if verify and (found := _sha256(path)) != hash_:
                raise LamaError(f"{path} must have SHA-256 {hash_}, as {META} says; got {found}. {again}")
            arrays[kind][part] = _map(path, type_)
        return TokenFiles(
            folder,
            train=arrays[""]["train"],
            validation=arrays[""]["validation"],
            vocab_size=int(meta["vocab_size"]),
            validation_bytes=int(meta["bytes"]["validation"]),
            n_bytes=sum(int(meta["bytes"][part]) for part in PARTS),
            corpus={name: str(meta["corpus"][name]) for name in ("name", "provenance", "licence")},
            text_digest=str(meta["text_sha256"]),
            tokenizer_digest=str(meta["tokenizer_sha256"]),
            digest=hashlib.sha256("".join(meta["sha256"].values()).encode()).hexdigest(),
            ends=arrays["ends"],
            counted=arrays["counted"],
            sources=[int(source["end"]) for source in meta.get("sources", [])],
            notes=dict(meta.get("notes", {})),
        )
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
        files = f"train.bin, validation.bin and {META}"
        raise LamaError(f"{folder} must hold {files}; got {found}. {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise LamaError(f"{folder / META} is damaged: {found}. {again}") from None


def own_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `tokenize` saved with the tokens. Raises LamaError."""
    spec = field_of(read_object(folder / META), "tokenizer", dict, quoted_path(folder / META))
    return tokenizer_from_json(spec, folder)


def link_tokens(tokens: TokenFiles, folder: Path) -> None:
    """Write a meta.json in `folder` that refers to the folder of the tokens."""
    about = {"at": str(tokens.folder.resolve()), "digest": tokens.digest}
    write_atomically(folder / META, f"{json.dumps(about, ensure_ascii=False, indent=1)}\n".encode())


def _linked(meta: Mapping[str, object], verify: bool) -> TokenFiles:
    at, digest = (field_of(meta, name, str, META) for name in ("at", "digest"))
    tokens = open_tokens(Path(at), verify)
    if tokens.digest != digest:
        raise LamaError(f"{quoted_path(at)} must hold the tokens that the run began with; got others")
    return tokens


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of everything that a checkpoint saves of a tokenizer; equal fingerprints mean equal ids."""
    digest = hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"\n{path.relative_to(folder).as_posix()} {_sha256(path)}".encode())
    return digest.hexdigest()


def _join(shards: Iterable[EncodedShard], writer: TokenWriter, validation: float, sources: list[int]) -> int:
    """Write all documents; fill `sources` with the sources' ends in `train`. Returns the held-out bytes."""
    held_bytes = 0

    def hold_out(ids: Array, begins: bool = True, ends: bool = True) -> int:
        writer.add("validation", ids, begins=begins, ends=ends)
        blocks = (ids[i : i + BLOCK].tolist() for i in range(0, len(ids), BLOCK))
        return sum(len(writer.tokenizer.decode_bytes(block)) for block in blocks)

    for (source, document), group in groupby(shards, key=attrgetter("source", "document")):
        if document is None:
            for shard in group:
                for ids, size, place in shard.documents():
                    if place == BY_SHARE:
                        cut = int(len(ids) * (1 - validation))
                        writer.add("train", ids[:cut])
                        held_bytes += hold_out(ids[cut:])
                    else:
                        writer.add(PARTS[place], ids)
                        held_bytes += size * (place == HELD_OUT)
        else:
            pieces = list(group)
            n, at = sum(piece.length() for piece in pieces), 0
            cut = int(n * (1 - validation))
            for piece in pieces:
                for ids, _, _ in piece.documents():
                    split, end = min(max(cut - at, 0), len(ids)), at + len(ids)
                    if split:
                        writer.add("train", ids[:split], begins=at == 0, ends=at + split == cut)
                    if split < len(ids):
                        held_bytes += hold_out(ids[split:], begins=at + split == cut, ends=end == n)
                    at = end
        sources[source] = writer.tokens["train"]
    return held_bytes  # decoding may have added text: a frame, spaces between words


def _map(path: Path, dtype: np.dtype) -> Array:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
