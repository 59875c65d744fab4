"""Train byte-level byte-pair encoding on a text, and write its files.

Source: Sennrich et al. 2016, section 3.2: the most frequent pair of neighbours becomes one symbol, and so on.
Radford et al. 2019, section 2.2: symbols start as bytes, and none crosses words, numbers and punctuation.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from operator import add
from pathlib import Path

from lama.errors import LamaError, UsageError
from lama.tokenizers.base import to_utf8
from lama.tokenizers.bpe import GPT2_PATTERN, BytePairTokenizer, byte_alphabet, splitter
from lama.tokenizers.huggingface import END_OF_TEXT, tokenizer_of_files
from lama.tokenizers.special import AddedToken

MAX_VOCAB_SIZE = 0x110000  # `learn_merges` writes an id as the character with that code point

Merge = tuple[str, str]  # both parts in GPT-2's byte alphabet: ("Ġ", "t")


def train_bpe(
    text: str | Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    progress: Callable[[Iterable[Merge]], Iterable[Merge]] = iter,
    at_most: bool = False,
) -> BytePairTokenizer:
    """Train a tokenizer: ids for the 256 bytes in GPT-2's order, the learned merges and the special tokens.

    There are exactly `vocab_size` entries or, with `at_most`, fewer if the text yields too few merges. The
    text may come in pieces, such as those of `Corpus.pieces`. It is split at special tokens. The tokenizer's
    end of text is `<|endoftext|>`, else the first special token. `progress` may watch the merges. Raises
    UsageError for an impossible size or special token, LamaError for a text that yields too few merges.
    """
    check_vocabulary(vocab_size, special_tokens)
    wanted = vocab_size - 256 - len(special_tokens)
    merges = list(progress(islice(learn_merges(count_words(text, special_tokens)), wanted)))
    if len(merges) < wanted and not at_most:
        raise LamaError(
            f"the corpus must yield {wanted} merges for a vocabulary of {vocab_size}; got {len(merges)}. "
            f"Give it more text, or ask for at most {vocab_size - wanted + len(merges)} entries"
        )
    tokenizer = tokenizer_of_files(trained_files(merges, special_tokens), Path("the trained tokenizer"))
    assert isinstance(tokenizer, BytePairTokenizer)
    return tokenizer


def check_vocabulary(vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise UsageError for a vocabulary that no text could yield."""
    for token in special_tokens:
        if not token or token.split() != [token] or not token.isprintable() or token in byte_alphabet():
            rule = "be printable, without white space, and no single byte's name"
            raise UsageError(f"a special token must {rule}; got {token!r}")
    if len(set(special_tokens)) < len(special_tokens):
        raise UsageError(f"special tokens must differ from each other; got {', '.join(special_tokens)}")
    least = 256 + len(special_tokens)
    if not least <= vocab_size <= MAX_VOCAB_SIZE:
        entries = f"{least} entries (256 bytes, {len(special_tokens)} special) to {MAX_VOCAB_SIZE}"
        raise UsageError(f"a vocabulary must have {entries}; got {vocab_size}")


def between_special_tokens(text: str | Iterable[str], special_tokens: Sequence[str]) -> Iterator[str]:
    """Split at special tokens: `"a<|b|>c"` gives "a", then "c". Raises LamaError for lone surrogates."""
    special = splitter(special_tokens) if special_tokens else None
    for piece in [text] if isinstance(text, str) else text:
        to_utf8(piece)
        yield from special.split(piece)[::2] if special else [piece]


def count_words(text: str | Iterable[str], special_tokens: Sequence[str] = ()) -> Counter[str]:
    """Count the pre-tokens of GPT-2's pattern: `"the cat"` gives `{"the": 1, " cat": 1}`."""
    import regex  # type: ignore[import-untyped]  # tiktoken's; late: importing lama stays light

    pattern = regex.compile(GPT2_PATTERN)
    return Counter(
        word.group()
        for part in between_special_tokens(text, special_tokens)
        for word in pattern.finditer(part)
    )


def learn_merges(counts: Mapping[str, int]) -> Iterator[Merge]:
    """Learn every merge of these words, in order. The rule is that of Hugging Face's `tokenizers`.

    The next merge is the pair of neighbours with the highest count over all words; of equal counts, with the
    lowest first id, then the lowest second id (ids: the 256 bytes in GPT-2's order, then merges). In "aaa"
    the pair "aa" counts twice, and the left one is merged.

    For a pair, only the words with it are visited, and only the counts next to a merge change. A word is a
    string with one character per token, whose code point is the id: strings compare as ids do.
    """
    spelled = list(byte_alphabet())
    to_id = {byte: i for i, byte in enumerate(byte_alphabet().values())}
    words = [word.encode().decode("latin-1").translate(to_id) for word in counts]
    times = list(counts.values())
    totals: defaultdict[str, int] = defaultdict(int)
    places: defaultdict[str, set[int]] = defaultdict(set)  # the words that hold a pair, or once did
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            totals[pair] += times[i]
            places[pair].add(i)
    # Each pair once; its total in the queue may be outdated, then it is too high.
    queue = [(-total, pair) for pair, total in totals.items()]
    heapify(queue)
    while queue:
        total, pair = heappop(queue)
        if -total != totals[pair]:
            if totals[pair]:
                heappush(queue, (-totals[pair], pair))
            continue
        first, second = pair[0], pair[1]
        token = chr(len(spelled))
        spelled.append(spelled[ord(first)] + spelled[ord(second)])
        gained = set()
        for i in places.pop(pair):
            pieces = words[i].split(pair)  # merged from left to right, as encoding does
            words[i] = token.join(pieces)
            n, last = times[i], len(pieces) - 1
            for k, piece in enumerate(pieces):
                changes = []  # neighbours before and after
                if piece and k > 0:
                    changes.append((second + piece[0], token + piece[0]))
                if piece and k < last:
                    changes.append((piece[-1] + first, piece[-1] + token))
                if not piece and 0 < k < last:
                    changes.append((second + first, token + token))
                for old, new in changes:
                    totals[old] -= n
                    totals[new] += n
                    places[new].add(i)
                    gained.add(new)
        totals[pair] = 0
        for new in gained:  # no other total rises
            heappush(queue, (-totals[new], new))
        yield spelled[ord(first)], spelled[ord(second)]


def trained_files(merges: Sequence[Merge], special_tokens: Sequence[str]) -> dict[str, bytes]:
    """The files that `tokenizers`, transformers and lama load, with ids in the order of training."""
    tokens = [*byte_alphabet(), *(first + second for first, second in merges), *special_tokens]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        clash = next(token for token in special_tokens if tokens.count(token) > 1)
        rule = "not be what the vocabulary calls another token"
        raise UsageError(f"a special token must {rule}; got {clash!r}")
    return vocabulary_files(vocabulary, merges, special_tokens)


def vocabulary_files(
    vocabulary: Mapping[str, int], merges: Sequence[Merge], special_tokens: Sequence[str]
) -> dict[str, bytes]:
    """`trained_files` for a vocabulary with ids in any order."""
    added = [AddedToken(token, vocabulary[token]) for token in special_tokens]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocabulary,
        "merges": [" ".join(merge) for merge in merges],
    }
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token.id} | vars(token) for token in added],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    end = END_OF_TEXT if END_OF_TEXT in special_tokens else None  # null, else transformers adds it
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": end,
        "unk_token": end,
        "eos_token": end or (special_tokens[0] if special_tokens else None),
    }
    return {
        "tokenizer.json": _json(spec),
        "tokenizer_config.json": _json(config),
        "vocab.json": _json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode(),
    }


def base_symbols(text: str | Iterable[str], special_tokens: Sequence[str] = ()) -> list[str]:
    """The distinct bytes of the text, in GPT-2's byte alphabet and in the order of their ids."""
    found = {byte for part in between_special_tokens(text, special_tokens) for byte in set(part.encode())}
    return [symbol for symbol, byte in byte_alphabet().items() if byte in found]


def spelled_out(ids: Sequence[int], vocabulary: Mapping[str, int]) -> str:
    """The tokens as `vocab.json` spells them: `"In Ġthe Ġbeginning Ċ"`, with a line break after each Ċ."""
    spelled = {i: token + ("\n" if "Ċ" in token else " ") for token, i in vocabulary.items()}
    return "".join([spelled[i] for i in ids]).rstrip() + "\n"


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
