"""Byte-level BPE on tiktoken's engine, and GPT-2's vocabulary, which ships beside this file."""

import contextlib
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

from lama.compiler import cache_folder
from lama.errors import LamaError, first_line
from lama.tokenizers.base import WHITE, Frame, TableTokenizer

# What a merge may not cross: contractions, words, numbers and punctuation, each with the space before it, and other white
# space. Source: openai/gpt-2, src/encoder.py; in tiktoken's spelling, which finds the same without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_VOCABULARY = Path(__file__).parent / "gpt2" / "vocab.bpe.gz"
GPT2_VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # unpacked; as tiktoken pins it
GPT2_MERGES_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"  # of its merges, one a line
CHECKED_AT_ONCE = 5_000  # merges; as many are checked in about 20 ms, more only once


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


class BytePairTokenizer(TableTokenizer):
    """Byte-level byte-pair encoding. Source: Sennrich et al. 2016; Radford et al. 2019, section 2.2.

    `ranks` gives each token's bytes the place of its merge; the lowest rank is merged first. `ids[rank]` is its id
    (None: the rank itself), -1 for a byte that the vocabulary lacks. tiktoken merges whenever two neighbours spell a
    token; Hugging Face only when they are that token's own two parts. `is_one_training` tells whether both are the same.

    `encode` reads the text of an added token, such as `<|endoftext|>`, as that token, as transformers does and
    nanoGPT's sampling; `encode_ordinary` reads it as text.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        added: Sequence[AddedToken],
        end_of_text: int | None,
        ids: Sequence[int] | None = None,
        unmerged: Mapping[int, bytes] | None = None,
        add_prefix_space: bool = False,
        spec: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        frame: Frame = ((), ()),
    ):
        """`unmerged`: the bytes of further ids, which are never produced. `spec`, `files`, `frame`: see TableTokenizer."""
        import tiktoken  # here, so that importing lama stays light

        table = dict(unmerged or {}) | {rank if ids is None else ids[rank]: token for token, rank in ranks.items()}
        table |= {token.id: token.content.encode() for token in added}
        table.pop(-1, None)
        super().__init__(table, end_of_text, frame, spec, files)
        self.add_prefix_space = add_prefix_space
        self._engine = tiktoken.Encoding("lama", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._missing = ids.index(-1) if ids is not None and -1 in ids else None
        self._own_ids = ids
        tiers = [{t.content: t for t in added if t.late is late} for late in (False, True)]
        self._tiers = [(tier, splitter(tier)) for tier in tiers if tier]

    def _ids(self, text: str, added: bool) -> list[int]:
        return self._encode(text, self._tiers if added else [])

    def _encode(self, text: str, tiers: Sequence[tuple[Mapping[str, AddedToken], re.Pattern[str]]]) -> list[int]:
        """Look for the tokens of the first tier, and in the text between them for those of the others."""
        if not tiers:
            return self._merge(text)
        tokens, pattern = tiers[0]
        ids: list[int] = []
        end = 0
        for match in pattern.finditer(text):
            token, (start, stop) = tokens[match.group()], match.span()
            while token.lstrip and start > end and text[start - 1] in WHITE:
                start -= 1
            while token.rstrip and stop < len(text) and text[stop] in WHITE:
                stop += 1
            ids += self._encode(text[end:start], tiers[1:])
            if not token.lstrip or end < stop:  # or else the token before has taken all of it
                ids.append(token.id)
            end = stop
        return ids + self._encode(text[end:], tiers[1:])

    def _merge(self, text: str) -> list[int]:
        if self.add_prefix_space and text and not text.startswith(" "):
            text = " " + text
        try:
            ranks = self._engine.encode_ordinary(text)
        except BaseException as error:  # a panic in tiktoken is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise LamaError(f"text must have less than a million white-space characters in a row; got {first_line(error)}") from None
        if self._own_ids is None:
            return ranks
        ids = [self._own_ids[rank] for rank in ranks]
        if self._missing is not None and -1 in ids:
            raise missing_byte(self._engine.decode_single_token_bytes(ranks[ids.index(-1)]), text)
        return ids


def missing_byte(byte: bytes, text: str) -> LamaError:
    return LamaError(f"text must be made of bytes that the vocabulary has; got 0x{byte.hex()} in {text[:40]!r}")


def splitter(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the tokens: the leftmost, then the longest; one group."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def is_one_training(merges: Sequence[str]) -> bool:
    """Whether merging whatever spells a token gives the same as merging its own two parts only, as one training makes it.

    So it is if every token, spelled by the merges before its own, is its own two parts: then other two that spell it are
    never neighbours when its turn comes. The answer for many merges is kept in lama's cache folder, under their hash.
    """
    digest = hashlib.sha256("\n".join(merges).encode()).hexdigest()
    if digest == GPT2_MERGES_SHA256 or len(merges) < CHECKED_AT_ONCE:
        return digest == GPT2_MERGES_SHA256 or _is_one_training(merges)
    known = cache_folder() / "merges" / digest
    with contextlib.suppress(OSError, KeyError):
        return {b"1": True, b"0": False}[known.read_bytes()]
    answer = _is_one_training(merges)
    with contextlib.suppress(OSError):  # an unwritable cache costs time only
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_bytes(b"1" if answer else b"0")
    return answer


def _is_one_training(merges: Sequence[str]) -> bool:
    """Undo each merge step by step, the latest first: no two neighbours at its seam may have merged before they were used.

    Of equal merges the leftmost comes first, so one across the seam comes before an equal one to the right of it.
    """
    rank_of: dict[tuple[str, str], int] = {}
    made: dict[str, tuple[int, str, str]] = dict.fromkeys(byte_alphabet(), (-1, "", ""))
    for rank, merge in enumerate(merges):
        first, second = merge.split(" ")
        if first not in made or second not in made or first + second in made:
            return False
        rank_of[first, second] = rank
        made[first + second] = (rank, first, second)
        left, right = made[first], made[second]
        while left[0] >= 0 or right[0] >= 0:
            if left[0] > right[0]:
                limit, first = left[0] - 1, left[2]
                left = made[first]
            else:
                limit, second = right[0], right[1]
                right = made[second]
            if rank_of.get((first, second), rank) <= limit:
                return False
    return True


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The printable character that GPT-2's vocabulary files write for each byte, in the order of the first 256 ids.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards: "Ġ" is the space.
    """
    themselves = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}


def spell(token: str) -> bytes:
    """The bytes of a vocabulary entry; one that is not in the byte alphabet stands for its own text."""
    alphabet = byte_alphabet()
    return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()


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
