"""Byte-level BPE on tiktoken's engine, and GPT-2's vocabulary, which ships beside this file."""

import functools
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lama.errors import LamaError
from lama.tokenizers.base import to_utf8, unknown_id

# What a merge may not cross: contractions, words, numbers and punctuation, each with the space before it, and other white
# space. Source: openai/gpt-2, src/encoder.py; in tiktoken's spelling, which finds the same without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_VOCABULARY = Path(__file__).parent / "gpt2" / "vocab.bpe.gz"
GPT2_VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # unpacked; as tiktoken pins it


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for its exact text and is found before the text is split.

    `lstrip` and `rstrip` take the white space on that side with it. `late` tokens are looked for after all others.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    late: bool = False


class BytePairTokenizer:
    """Byte-level byte-pair encoding. Source: Sennrich et al. 2016; Radford et al. 2019, section 2.2.

    `ranks` gives each token's bytes the place of its merge; the lowest rank is merged first. `ids[rank]` is its id
    (None: the rank itself), -1 for a byte that the vocabulary lacks. tiktoken merges whenever two neighbours spell a
    token; Hugging Face only when they are that token's own two parts. For merges that came out of BPE training it is
    the same: a token's text never splits into two other tokens.

    `encode` reads the text of an added token, such as `<|endoftext|>`, as that token, as transformers does and
    nanoGPT's sampling; `encode_ordinary` reads it as text, which is right for text that is not trusted.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        added: Sequence[AddedToken],
        end_of_text: int | None,
        ids: Sequence[int] | None = None,
        unmerged: Mapping[int, bytes] | None = None,
        add_prefix_space: bool = False,
        spec: dict[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ):
        """`unmerged`: the bytes of further ids that decode but are never produced. `spec` and `files`: see `to_json`, `save`."""
        import tiktoken  # here, so that importing lama stays light

        self.end_of_text = end_of_text
        self.add_prefix_space = add_prefix_space
        self.files = files or {}
        self._spec = spec or {}
        self._engine = tiktoken.Encoding("lama", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._ids = ids
        self._bytes = dict(unmerged or {}) | {rank if ids is None else ids[rank]: token for token, rank in ranks.items()}
        self._bytes |= {token.id: token.content.encode() for token in added}
        self._bytes.pop(-1, None)
        self.vocab_size = max(self._bytes) + 1
        self._added = {token.content: token.id for token in added}
        tiers = [[token for token in added if token.late is late] for late in (False, True)]
        self._splitters = [splitter(tier) for tier in tiers if tier]

    def encode(self, text: str) -> list[int]:
        to_utf8(text)
        return self._encode(text, self._splitters)

    def encode_ordinary(self, text: str) -> list[int]:
        """Like `encode`, but added tokens are not recognised."""
        to_utf8(text)
        return self._encode(text, [])

    def _encode(self, text: str, splitters: Sequence[re.Pattern[str]]) -> list[int]:
        if not splitters:
            return self._merge(text)
        ids: list[int] = []
        for i, part in enumerate(splitters[0].split(text)):  # text, token, text, token, ..., text
            ids += [self._added[part if part in self._added else part.strip()]] if i % 2 else self._encode(part, splitters[1:])
        return ids

    def _merge(self, text: str) -> list[int]:
        if self.add_prefix_space and text and not text.startswith(" "):
            text = " " + text
        try:
            ranks = self._engine.encode_ordinary(text)
        except BaseException as error:  # a panic in tiktoken is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise LamaError(f"text must have less than a million white-space characters in a row; got {error}") from None
        if self._ids is None:
            return ranks
        ids = [self._ids[rank] for rank in ranks]
        if -1 in ids:
            byte = self._engine.decode_single_token_bytes(ranks[ids.index(-1)])
            raise LamaError(f"text must be made of bytes that the vocabulary has; got 0x{byte.hex()} in {text[:40]!r}")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join([self._bytes[i] for i in ids])
        except KeyError as error:
            raise unknown_id(error.args[0], self.vocab_size) from None

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return dict(self._spec)

    def save(self, folder: Path) -> None:
        """Write the files that the tokenizer was read from, where there were any, below `folder`."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def splitter(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Finds any of the tokens: the leftmost, then the longest."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    return re.compile("(" + "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in longest_first) + ")")


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The printable character that GPT-2's vocabulary files write for each byte, in the order of the first 256 ids.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards: "Ġ" is the space.
    """
    themselves = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}


def ranks_of(merges: Iterable[str]) -> dict[bytes, int]:
    """The 256 bytes, then each merge's result, numbered. A merge is written "Ġ t"."""
    tokens = [bytes([b]) for b in byte_alphabet().values()]
    # Translated all at once, for speed; U+0100 ends a line, as "\n" is a byte by then.
    alphabet = {ord(character): byte for character, byte in byte_alphabet().items()} | {ord(" "): None, ord("\n"): 0x100}
    tokens += [token.encode("latin-1") for token in "\n".join(merges).translate(alphabet).split("\u0100") if token]
    return {token: rank for rank, token in enumerate(tokens)}


@functools.cache
def gpt2_tokenizer() -> BytePairTokenizer:
    """GPT-2's own: 50,257 ids, `<|endoftext|>` is 50256. No network. Raises LamaError if the vocabulary file was altered."""
    added = [AddedToken("<|endoftext|>", 50256)]
    return BytePairTokenizer(_gpt2_ranks(GPT2_VOCABULARY), added, end_of_text=50256, spec={"kind": "gpt2"})


def gpt2_files() -> dict[str, bytes]:
    """GPT-2's vocabulary as the two files that Hugging Face's libraries read: vocab.json and merges.txt."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    ranks = _gpt2_ranks(GPT2_VOCABULARY)
    vocabulary = {"".join(characters[byte] for byte in token): rank for token, rank in ranks.items()} | {"<|endoftext|>": 50256}
    return {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": _gpt2_merges(GPT2_VOCABULARY)}


def _gpt2_ranks(path: Path) -> dict[bytes, int]:
    return ranks_of(_gpt2_merges(path).decode().split("\n")[1:-1])  # between the version line and the end


def _gpt2_merges(path: Path) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise LamaError(f"GPT-2's vocabulary must be readable; got {error} for {path}. Install lama again") from None
    if (digest := hashlib.sha256(content).hexdigest()) != GPT2_VOCABULARY_SHA256:
        raise LamaError(f"GPT-2's vocabulary must have SHA-256 {GPT2_VOCABULARY_SHA256}; got {digest} for {path}. Install lama again")
    return content
