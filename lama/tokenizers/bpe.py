"""Byte-level BPE on tiktoken's engine, and GPT-2's vocabulary, from the file in lama/tokenizers/gpt2."""

import contextlib
import functools
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from lama.errors import LamaError, first_line
from lama.host import cache_folder
from lama.tokenizers.base import WHITE, Common, TableTokenizer
from lama.tokenizers.special import AddedToken

# No merge crosses these pieces: contractions, words, numbers and punctuation, each with the space before it,
# and other white space. Source: openai/gpt-2, src/encoder.py; in tiktoken's spelling without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_VOCABULARY = Path(__file__).parent / "gpt2" / "vocab.bpe.gz"
# The hashes of the unpacked file, the same as tiktoken's, and of its merges, joined by line breaks.
GPT2_VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_MERGES_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
CHECKED_AT_ONCE = 5_000  # merges: these are checked in about 20 ms; the result for more is cached

Tier: TypeAlias = tuple[Mapping[str, AddedToken], re.Pattern[str]]


class BytePairTokenizer(TableTokenizer):
    """Byte-level byte-pair encoding. Source: Sennrich et al. 2016; Radford et al. 2019, section 2.2.

    `ranks` maps each token's bytes to the rank of its merge; the lowest rank is merged first. `ids[rank]` is
    its id (None: the rank), -1 for a byte that the vocabulary lacks. tiktoken merges any two neighbours that
    spell a token; Hugging Face only that token's own two parts. `is_one_training` says if both agree.

    `encode` turns the text of an added token, such as `<|endoftext|>`, into that token, as transformers does;
    `encode_ordinary` does not.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        added: Sequence[AddedToken],
        common: Common,
        ids: Sequence[int] | None = None,
        unmerged: Mapping[int, bytes] | None = None,
        add_prefix_space: bool = False,
    ):
        """`unmerged`: the bytes of ids that are never produced."""
        import tiktoken  # late: importing lama stays light

        table = dict(unmerged or {})
        table |= {rank if ids is None else ids[rank]: token for token, rank in ranks.items()}
        table |= {token.id: token.content.encode() for token in added}
        table.pop(-1, None)
        super().__init__(table, common)
        self.add_prefix_space = add_prefix_space
        self.added = added
        self._engine = tiktoken.Encoding(
            "lama", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self._missing = ids.index(-1) if ids is not None and -1 in ids else None
        self._own_ids = ids
        first = {token.content: token for token in added if not token.normalized}
        last = {token.content: token for token in added if token.normalized}
        self._tiers = [(tier, splitter(tier)) for tier in (first, last) if tier]

    def _ids(self, text: str, added: bool) -> list[int]:
        return self._encode(text, self._tiers if added else [])

    def _encode(self, text: str, tiers: Sequence[Tier]) -> list[int]:
        """Find the tokens of the first tier, and those of the other tiers in the text between them."""
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
            if not token.lstrip or end < stop:  # else the token before includes all of it
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
            rule = "have less than a million white-space characters in a row"
            raise LamaError(f"text must {rule}; got {first_line(error)}") from None
        if self._own_ids is None:
            return ranks
        ids = [self._own_ids[rank] for rank in ranks]
        if self._missing is not None and -1 in ids:
            raise missing_byte(self._engine.decode_single_token_bytes(ranks[ids.index(-1)]), text)
        return ids


def missing_byte(byte: bytes, text: str) -> LamaError:
    got = f"0x{byte.hex()} in {text[:40]!r}"
    return LamaError(f"text must be made of bytes that the vocabulary has; got {got}")


def splitter(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern with one group that matches the leftmost, then the longest token."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def is_one_training(merges: Sequence[str]) -> bool:
    """Whether merging any two parts that spell a token equals merging only the two parts of its own merge.

    This holds if the merges before a token's own always spell it as these two parts: then no other two parts
    of it are neighbours at that point. The answer for many merges is cached on disk.
    """
    if len(merges) < CHECKED_AT_ONCE:
        return _is_one_training(merges)
    digest = hashlib.sha256("\n".join(merges).encode()).hexdigest()
    if digest == GPT2_MERGES_SHA256:
        return True
    known = cache_folder() / "merges" / digest
    with contextlib.suppress(OSError, KeyError):
        return {b"1": True, b"0": False}[known.read_bytes()]
    answer = _is_one_training(merges)
    with contextlib.suppress(OSError):  # an unwritable cache costs time only
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_bytes(b"1" if answer else b"0")
    return answer


def _is_one_training(merges: Sequence[str]) -> bool:
    """Undo each merge step by step, the latest first: no neighbours at its seam may have merged before.

    Of equal merges the leftmost comes first, so one across the seam comes before an equal one to its right.
    """
    rank_of: dict[tuple[str, str], int] = {}
    known: dict[str, tuple[int, str, str]] = dict.fromkeys(byte_alphabet(), (-1, "", ""))
    for rank, merge in enumerate(merges):
        first, second = merge.split(" ")
        if first not in known or second not in known or first + second in known:
            return False
        rank_of[first, second] = rank
        known[first + second] = (rank, first, second)
        left, right = known[first], known[second]
        while left[0] >= 0 or right[0] >= 0:
            if left[0] > right[0]:
                limit, first = left[0] - 1, left[2]
                left = known[first]
            else:
                limit, second = right[0], right[1]
                right = known[second]
            if rank_of.get((first, second), rank) <= limit:
                return False
    return True


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The character of each byte in GPT-2's vocabulary files, in the order of the first 256 ids.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards: "Ġ" is the space.
    """
    themselves = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}


def spell(token: str) -> bytes:
    """The bytes of a vocabulary entry; an entry outside the byte alphabet is its own text."""
    alphabet = byte_alphabet()
    return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()


def ranks_of(merges: Iterable[str]) -> dict[bytes, int]:
    """The ranks of the 256 bytes and of each merge's result. A merge is written "Ġ t"."""
    tokens = [bytes([b]) for b in byte_alphabet().values()]
    # All at once, for speed. U+0100 ends a line, because "\n" is a byte after the translation.
    alphabet: dict[int, int | None] = {ord(" "): None, ord("\n"): 0x100}
    alphabet |= {ord(character): byte for character, byte in byte_alphabet().items()}
    lines = "\n".join(merges).translate(alphabet).split("\u0100")
    tokens += [token.encode("latin-1") for token in lines if token]
    return {token: rank for rank, token in enumerate(tokens)}


@functools.cache
def gpt2_tokenizer() -> BytePairTokenizer:
    """GPT-2's tokenizer: 50,257 ids, `<|endoftext|>` is 50256. Raises LamaError if its file was altered."""
    common = Common(50256, spec={"kind": "gpt2"})
    return BytePairTokenizer(_gpt2_ranks(), [AddedToken("<|endoftext|>", 50256)], common)


def gpt2_files() -> dict[str, bytes]:
    """GPT-2's vocabulary as the two files that Hugging Face's libraries read: vocab.json and merges.txt."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    ranks = _gpt2_ranks()
    vocabulary = {"".join(characters[byte] for byte in token): rank for token, rank in ranks.items()}
    vocabulary["<|endoftext|>"] = 50256
    return {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": _gpt2_merges()}


def _gpt2_ranks() -> dict[bytes, int]:
    return ranks_of(_gpt2_merges().decode().split("\n")[1:-1])  # between the version line and the end


def _gpt2_merges() -> bytes:
    try:
        content = gzip.decompress(GPT2_VOCABULARY.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        got = f"got {error} for {GPT2_VOCABULARY}. Install lama again"
        raise LamaError(f"GPT-2's vocabulary must be readable; {got}") from None
    if (digest := hashlib.sha256(content).hexdigest()) != GPT2_VOCABULARY_SHA256:
        got = f"got {digest} for {GPT2_VOCABULARY}. Install lama again"
        raise LamaError(f"GPT-2's vocabulary must have SHA-256 {GPT2_VOCABULARY_SHA256}; {got}")
    return content
