"""Tokenizers in Hugging Face's files give the ids of the library `tokenizers` and of transformers, on odd
texts of every kind.
"""

import functools
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf

from lama.data import encode_pieces
from lama.data import pieces as data_pieces
from lama.errors import LamaError
from lama.tokenizers import (
    BytePairTokenizer,
    StreamDecoder,
    WordPieceTokenizer,
    load_huggingface_tokenizer,
    load_wordpiece_tokenizer,
    tokenizer_from_json,
    train_bpe,
)

SOURCE = Path(__file__).read_text(encoding="utf-8")
END = "<|endoftext|>"
TRAINED = json.loads(train_bpe(SOURCE, 420).files["tokenizer/tokenizer.json"])
VOCABULARY: dict[str, int] = TRAINED["model"]["vocab"]  # END is 419, the last
MERGES: list[str] = TRAINED["model"]["merges"]
LINES = "\n".join(["#version: 0.2", *MERGES, ""])
# Of two trainings: abc is a + bc, but ab + c spells it too.
GLUED = ["a b", "b c", "a bc", "t h", "h e", "th e", "t he"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789éİß"
WORDS = (
    "the low ##er new ##est ##s cafe café CAFE Café über uber Über naive 中 東 京 it don special token "
    "newword . [ ] < > | mask !"
)
ENTRIES = list(
    dict.fromkeys([*BERT, *WORDS.split(), *(mark + letter for letter in LETTERS for mark in ("", "##"))])
)
N = len(ENTRIES)
GPT2, BERT_MODEL = {"model_type": "gpt2"}, {"model_type": "bert"}
AS_IT_STANDS = {"tokenizer_class": "PreTrainedTokenizerFast"}


def token(content: str, number: int | None = None, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return ({} if number is None else {"id": number}) | {"content": content} | off | flags


def spec_of(*added: dict[str, Any], model: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    ours = {
        "added_tokens": [token(END, 419, special=True), *added],
        "model": TRAINED["model"] | (model or {}),
    }
    return TRAINED | ours | {"post_processor": None} | parts


def byte_level(prefix: bool = False, regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def template(*single: str, **ids: int) -> dict[str, Any]:
    """`template("s", "A", s=420)`: the token s before the text."""
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if s == "A"
        else {"SpecialToken": {"id": f"<{s}>", "type_id": 0}}
        for s in single
    ]
    tokens = {f"<{s}>": {"id": f"<{s}>", "ids": [i], "tokens": [f"<{s}>"]} for s, i in ids.items()}
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": tokens,
    }


def wordpiece_spec(
    *added: dict[str, Any], normalizer: Any = None, split: Any = None, post: Any = None, **options: Any
) -> dict[str, Any]:
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    return {
        "version": "1.0",
        "added_tokens": [token(entry, i, special=True) for i, entry in enumerate(BERT)] + list(added),
        "normalizer": normalizer,
        "pre_tokenizer": split or {"type": "BertPreTokenizer"},
        "post_processor": post,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": model | {"vocab": {entry: i for i, entry in enumerate(ENTRIES)}} | options,
    }


def bert_normalizer(**options: Any) -> dict[str, Any]:
    return {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    } | options


SPLIT = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
DIGITS = {"type": "Digits", "individual_digits": True}
LOWER = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
CASED = {"content": "[ENT]"}


def without_bytes(**model: Any) -> dict[str, Any]:
    """A vocabulary without x, z and the first byte of é."""
    gone = {"x", "z", "Ã"}
    entries = [entry for entry in VOCABULARY if not gone & set(entry) and entry != END] + ["<unk>"]
    kept = [merge for merge in MERGES if not gone & set(merge)]
    return spec_of(
        model={"vocab": {entry: i for i, entry in enumerate(entries)}, "merges": kept} | model,
        added_tokens=[],
    )


# --- the oracle where transformers is not installed: the library's own classes, put together by hand


def bpe(
    *added: dict[str, Any],
    split: Any = None,
    normalizer: Any = None,
    vocabulary: dict[str, int] = VOCABULARY,
    merges: list[str] = MERGES,
    **options: Any,
) -> hf.Tokenizer:
    made = hf.Tokenizer(
        hf.models.BPE(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges], **options)
    )
    made.pre_tokenizer = split or hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(
        [hf.AddedToken(**{key: value for key, value in each.items() if key != "id"}) for each in added]
    )
    return made


def wordpiece(
    *added: dict[str, Any],
    frame: bool = True,
    split: Any = None,
    normalizer: Any = None,
    most: int = 100,
    **options: Any,
) -> hf.Tokenizer:
    vocabulary = {entry: i for i, entry in enumerate(ENTRIES)}
    made = hf.Tokenizer(
        hf.models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=most)
    )
    made.normalizer = normalizer or hf.normalizers.BertNormalizer(**options)
    made.pre_tokenizer = split or hf.pre_tokenizers.BertPreTokenizer()
    made.add_tokens([hf.AddedToken(entry, special=True, normalized=False) for entry in BERT])
    made.add_tokens(
        [hf.AddedToken(**{key: value for key, value in each.items() if key != "id"}) for each in added]
    )
    if frame:
        made.post_processor = hf.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def framed(made: hf.Tokenizer, single: str, **ids: int) -> hf.Tokenizer:
    made.post_processor = hf.processors.TemplateProcessing(
        single=single, special_tokens=[(f"<{s}>", i) for s, i in ids.items()]
    )
    return made


EOT = token(END, special=True)
OLD = {"vocab.json": VOCABULARY, "merges.txt": LINES, "config.json": GPT2}
FAST = {"tokenizer_config.json": AS_IT_STANDS, "config.json": GPT2}
Sequence, Level = hf.pre_tokenizers.Sequence, hf.pre_tokenizers.ByteLevel
FOLDERS: dict[str, tuple[dict[str, Any], Callable[[], hf.Tokenizer]]] = {
    "old files": (OLD, lambda: bpe(EOT)),
    "old files with CRLF": (OLD | {"merges.txt": LINES.replace("\n", "\r\n")}, lambda: bpe(EOT)),
    "additional special tokens": (
        OLD
        | {
            "vocab.json": VOCABULARY | {"<s1>": 420},
            "tokenizer_config.json": {"additional_special_tokens": ["<s1>", "<a>"]},
        },
        lambda: bpe(EOT, token("<s1>"), token("<a>")),
    ),
    "added_tokens_decoder": (
        OLD
        | {
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "419": token(END, special=True, normalized=True),
                    "420": token("<usr>"),
                    "421": token("special token", normalized=True),
                    "422": token("<mask>", lstrip=True),
                    "423": token(" foo", lstrip=True),
                    "424": token("\n", rstrip=True),
                },
                "mask_token": "<mask>",
            }
        },
        lambda: bpe(
            EOT | {"normalized": True},
            token("<usr>"),
            token("special token", normalized=True),
            token("<mask>", lstrip=True),
            token(" foo", lstrip=True),
            token("\n", rstrip=True),
        ),
    ),
    "a mask that takes the space before it": (
        OLD
        | {
            "vocab.json": VOCABULARY | {"<mask>": 420},
            "tokenizer_config.json": {"mask_token": {"__type": "AddedToken"} | token("<mask>", lstrip=True)},
        },
        lambda: bpe(EOT, token("<mask>", lstrip=True), vocabulary=VOCABULARY | {"<mask>": 420}),
    ),
    "special_tokens_map.json and added_tokens.json": (
        OLD
        | {
            "special_tokens_map.json": {
                "bos_token": "<s>",
                "eos_token": {
                    "content": "</s>",
                    "lstrip": False,
                    "rstrip": True,
                    "single_word": False,
                    "normalized": True,
                },
                "unk_token": "<unk>",
                "additional_special_tokens": ["<usr>"],
            },
            "added_tokens.json": {"<s>": 420, "newword": 421, "<usr>": 422},
        },
        lambda: bpe(
            token("<s>"),
            token("newword", normalized=True),
            token("<usr>"),
            token("</s>", rstrip=True, normalized=True),
            token("<unk>"),
        ),
    ),
    "add_bos_token": (
        OLD
        | {
            "tokenizer_config.json": {
                "add_bos_token": True,
                "add_eos_token": True,
                "bos_token": "<s>",
                "eos_token": "<e>",
            }
        },
        lambda: framed(bpe(token("<s>"), token("<e>"), EOT), "<s> $A <e>", s=420, e=421),
    ),
    "add_prefix_space": (
        OLD | {"tokenizer_config.json": {"add_prefix_space": True}},
        lambda: bpe(EOT, split=Level(add_prefix_space=True)),
    ),
    "merges that no single training made": (
        {
            "vocab.json": {c: i for i, c in enumerate(VOCABULARY) if i < 256}
            | {merge.replace(" ", ""): 256 + i for i, merge in enumerate(GLUED[:6])},
            "merges.txt": "\n".join(GLUED),
            "tokenizer_config.json": {"bos_token": None, "eos_token": None, "unk_token": None},
            "config.json": GPT2,
        },
        lambda: bpe(
            vocabulary={c: i for i, c in enumerate(VOCABULARY) if i < 256}
            | {m.replace(" ", ""): 256 + i for i, m in enumerate(GLUED[:6])},
            merges=GLUED,
        ),
    ),
    # It takes over the vocabulary, the merges, the template and the tokens.
    "GPT-2's class over a tokenizer.json": (
        {
            "tokenizer.json": spec_of(
                token("special token", 420),
                token("<mask>", 421, lstrip=True, rstrip=True, special=True),
                normalizer={"type": "NFC"},
                pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, byte_level()]},
                post_processor=template("s", "A", s=419),
            ),
            "config.json": GPT2,
        },
        lambda: framed(
            bpe(EOT, token("special token"), token("<mask>", lstrip=True, rstrip=True)), "<s> $A", s=419
        ),
    ),
    "NFC": (
        FAST | {"tokenizer.json": spec_of(normalizer={"type": "NFC"})},
        lambda: bpe(EOT, normalizer=hf.normalizers.NFC()),
    ),
    "NFKC, lower case and normalized tokens": (
        FAST
        | {
            "tokenizer.json": spec_of(
                token("CAFÉ", 420, normalized=True), token("Special Token", 421), normalizer=LOWER
            )
        },
        lambda: bpe(
            EOT,
            token("CAFÉ", normalized=True),
            token("Special Token"),
            normalizer=hf.normalizers.Sequence([hf.normalizers.NFKC(), hf.normalizers.Lowercase()]),
        ),
    ),
    "digits": (
        FAST
        | {
            "tokenizer.json": spec_of(
                pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, byte_level()]}
            )
        },
        lambda: bpe(
            EOT,
            split=Sequence([hf.pre_tokenizers.Digits(individual_digits=True), Level(add_prefix_space=False)]),
        ),
    ),
    "a split of its own": (
        FAST
        | {
            "tokenizer.json": spec_of(
                pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, byte_level(regex=False)]}
            )
        },
        lambda: bpe(
            EOT,
            split=Sequence(
                [
                    hf.pre_tokenizers.Split(hf.Regex(SPLIT["pattern"]["Regex"]), "isolated"),  # type: ignore[index]
                    Level(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
    ),
    "single words": (
        FAST
        | {
            "tokenizer.json": spec_of(
                token("newword", 420, single_word=True), token("low", 421, single_word=True, normalized=True)
            )
        },
        lambda: bpe(EOT, token("newword", single_word=True), token("low", single_word=True, normalized=True)),
    ),
    "parts that change nothing": (
        FAST
        | {
            "tokenizer.json": spec_of(
                normalizer={"type": "Sequence", "normalizers": []},
                pre_tokenizer={"type": "Sequence", "pretokenizers": [byte_level()]},
                post_processor={"type": "Sequence", "processors": [byte_level(), template("A")]},
            )
        },
        lambda: bpe(EOT),
    ),
    "a template on both sides": (
        {
            "tokenizer.json": spec_of(
                token("<s>", 420, special=True), post_processor=template("s", "A", "e", s=420, e=419)
            ),
            "tokenizer_config.json": AS_IT_STANDS | {"bos_token": "<s>", "pad_token": "<pad>"},
            "config.json": GPT2,
        },
        lambda: framed(bpe(EOT, token("<s>"), token("<pad>")), "<s> $A <e>", s=420, e=419),
    ),
    "unk_token": (
        FAST | {"tokenizer.json": without_bytes(unk_token="<unk>")},
        lambda: bpe(
            vocabulary=without_bytes()["model"]["vocab"],
            merges=without_bytes()["model"]["merges"],
            unk_token="<unk>",
            fuse_unk=False,
        ),
    ),
    "special tokens as text": (
        {
            "tokenizer.json": spec_of(token("<usr>", 420)),
            "tokenizer_config.json": AS_IT_STANDS | {"split_special_tokens": True},
            "config.json": GPT2,
        },
        lambda: bpe(token("<usr>"), vocabulary=VOCABULARY),
    ),
    "BERT with CRLF": (
        {"vocab.txt": "\r\n".join([*ENTRIES, ""]), "config.json": BERT_MODEL},
        lambda: wordpiece(),
    ),
    "BERT that keeps accents": (
        {
            "vocab.txt": "\n".join(ENTRIES),
            "tokenizer_config.json": {"strip_accents": False},
            "config.json": BERT_MODEL,
        },
        lambda: wordpiece(strip_accents=False),
    ),
    "cased BERT without accents or Chinese": (
        {
            "vocab.txt": "\n".join(ENTRIES),
            "tokenizer_config.json": {
                "do_lower_case": False,
                "strip_accents": True,
                "tokenize_chinese_chars": False,
            },
            "config.json": BERT_MODEL,
        },
        lambda: wordpiece(lowercase=False, strip_accents=True, handle_chinese_chars=False),
    ),
    "BERT with added tokens": (
        {
            "vocab.txt": "\n".join(ENTRIES),
            "added_tokens.json": {"<e1>": N, "Newwords": N + 1, "[ENT]": N + 2},
            "special_tokens_map.json": {"additional_special_tokens": ["[ENT]"]},
            "config.json": BERT_MODEL,
        },
        lambda: wordpiece(
            token("<e1>", normalized=True), token("Newwords", normalized=True), token("[ENT]", special=True)
        ),
    ),
    "BERT's tokenizer.json as it stands": (
        {
            "tokenizer.json": wordpiece_spec(
                token("<e1>", N),
                normalizer=bert_normalizer(strip_accents=False),
                post={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
            ),
            "tokenizer_config.json": AS_IT_STANDS,
            "config.json": BERT_MODEL,
        },
        lambda: wordpiece(token("<e1>"), strip_accents=False),
    ),
    "GPT-2 with BERT's vocab.txt": (
        {"vocab.txt": "\n".join(ENTRIES), "config.json": GPT2 | {"tokenizer_class": "BertTokenizer"}},
        lambda: wordpiece(),
    ),
    "GPT-2 with another WordPiece": (
        FAST
        | {
            "tokenizer.json": wordpiece_spec(
                normalizer={"type": "Lowercase"}, split={"type": "Whitespace"}, max_input_chars_per_word=20
            )
        },
        lambda: wordpiece(
            frame=False, normalizer=hf.normalizers.Lowercase(), split=hf.pre_tokenizers.Whitespace(), most=20
        ),
    ),
}
every_folder = pytest.mark.parametrize("name", FOLDERS)

ODD_WORDS = """
the it's IT'LL 're low lower newest naïve Über über CAFÉ ﬁ ẞ Σς 東京 中 한글 カナ عربى 1234 3.14 ٣ ½ Ⅷ
x=1; ... !? _a_b ##s $ ^ ```
<|endoftext|> <|endoftext |> <s1> <usr> <mask> <MASK> [MASK] [mask] [UNK] [CLS] [PAD] [ENT]
newword newwords Newwords <a> <a <ab>
</s> <s> <unk> <e1> abc bc Special
"""
ODD = [
    *ODD_WORDS.split(),
    *(
        "cafe\u0301",
        "i\u0307",
        "İ",
        "\u1112\u1161\u11ab",
        "Ω\u0301",
        "\U0001f468\u200d\U0001f469",
        "👍🏽",
        "\u200b",
        "\ufeff",
        "\ufffd",
    ),
    *("\x00", "\x07", "\x7f", "\x85", "\xad", "\u2028", "\U0010ffff", "\U00020000", "a" * 130, "é" * 30),
    *("special token", "Special Token", "special  token", " foo", "foo bar"),
]
SPACES = [
    " ",
    " ",
    " ",
    "",
    "",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n ",
    "\u3000",
    "\u00a0",
    "\x1c",
    "\x1f",
    "\x0b",
    "   \n\n",
    "\u2009",
]


@functools.cache
def odd_texts(seed: int, n: int = 2000) -> tuple[str, ...]:
    rng = random.Random(seed)
    return tuple(odd_text(rng) for _ in range(n))


def odd_text(rng: random.Random) -> str:
    text = rng.choice(SPACES)
    for _ in range(rng.choice((0, 1, 2, 3, 5, 9, 20))):
        kind = rng.random()
        if kind < 0.7:
            text += rng.choice(ODD)
        elif kind < 0.9:
            text += "".join(rng.choices("abcdefghilnorstuwABCDEé0 ", k=rng.randint(1, 8)))
        else:
            code = rng.randrange(0x110000) if rng.random() < 0.3 else rng.randrange(0x3000)
            text += "x" if 0xD800 <= code < 0xE000 else chr(code)
        text += rng.choice(SPACES)
    return text


def write(folder: Path, name: str) -> Path:
    return write_files(folder, FOLDERS[name][0])


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text, encoding="utf-8", newline="")
    return folder


def whole(tokenizer: Any, text: str) -> list[int]:
    """The ids that transformers calls `input_ids`."""
    return tokenizer.framed(text) if isinstance(tokenizer, WordPieceTokenizer) else tokenizer.encode(text)


def check_ids(tokenizer: Any, texts: tuple[str, ...], wanted: list[list[int]]) -> None:
    for text, ids in zip(texts, wanted, strict=True):
        assert whole(tokenizer, text) == ids, text


@every_folder
def test_ids_are_those_of_the_library(tmp_path, name):
    # Or else those of transformers tell more.
    texts = odd_texts(0, 200 if importlib.util.find_spec("transformers") else 2000)
    tokenizer = load_huggingface_tokenizer(write(tmp_path, name))
    check_ids(tokenizer, texts, [each.ids for each in FOLDERS[name][1]().encode_batch(list(texts))])


def check_transformers(folder: Path, texts: tuple[str, ...]) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = load_huggingface_tokenizer(folder)
    check_ids(tokenizer, texts, theirs(list(texts)).input_ids)
    if theirs.eos_token is not None:
        assert tokenizer.end_of_text == theirs.eos_token_id


@pytest.mark.peers
@every_folder
def test_ids_are_those_of_transformers(tmp_path, name):
    check_transformers(write(tmp_path, name), odd_texts(1))


def new_seed() -> int:
    """Drawn in a test, as every process of pytest must collect the same ones, and shown where the test
    fails.
    """
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    return seed


@pytest.mark.slow
@pytest.mark.parametrize("time", range(3))
@every_folder
def test_ids_are_those_of_transformers_on_new_texts(tmp_path, name, time):
    check_transformers(write(tmp_path, name), odd_texts(new_seed()))


@pytest.mark.peers
@pytest.mark.parametrize(
    "kind", ["gpt2", "gpt2 with tokens", "bert", "bert with tokens", "as it stands", "saved again"]
)
def test_folders_that_transformers_wrote_give_its_ids(tmp_path, kind):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )
    if kind.startswith("bert"):
        made = transformers.BertTokenizer(
            vocab={entry: i for i, entry in enumerate(ENTRIES)}, strip_accents=False
        )
    elif kind == "as it stands":
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=hf.Tokenizer.from_str(json.dumps(spec_of(normalizer=LOWER)))
        )
    else:
        made = transformers.GPT2Tokenizer(
            vocab=VOCABULARY, merges=[tuple(merge.split()) for merge in MERGES], add_bos_token=kind == "gpt2"
        )
    if kind.endswith("tokens") or kind == "as it stands":
        made.add_tokens(["<e1>", "Newwords", hf.AddedToken("special token", rstrip=True)])
        made.add_special_tokens(
            {"additional_special_tokens": ["<usr>", hf.AddedToken(" foo", lstrip=True)], "pad_token": "[PAD]"}
        )
    if kind == "saved again":
        made = transformers.AutoTokenizer.from_pretrained(write(tmp_path / "old", "added_tokens_decoder"))
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BERT_MODEL if kind.startswith("bert") else GPT2))
    check_transformers(tmp_path, odd_texts(2, 1000))


NAMES = [
    "<s>",
    "</s>",
    "<unk>",
    "<mask>",
    "<usr>",
    "[PAD]",
    "[MASK]",
    "[ENT]",
    "special token",
    " foo",
    "newword",
    END,
    "the",
    "\n",
    "Über",
]
ROLES = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "mask_token",
    "sep_token",
    "cls_token",
    "image_token",
]


def random_token(rng: random.Random, content: str, kind: dict[str, str]) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": content, **kind} | {flag: rng.random() < 0.35 for flag in flags if rng.random() < 0.8}


def random_folder(rng: random.Random) -> dict[str, Any]:
    """Files that name tokens in all ways that there are, each file there or not."""
    gpt2, new = rng.random() < 0.5, rng.random() < 0.5
    base, classes = (420, ["GPT2TokenizerFast"]) if gpt2 else (N, ["BertTokenizer"])
    free = [name for name in NAMES if name not in (VOCABULARY if gpt2 else ENTRIES)]

    def names(kind: dict[str, str]) -> Any:
        content = rng.choice(NAMES)
        return content if rng.random() < 0.6 else random_token(rng, content, kind)

    fields: dict[str, Any] = {
        role: names({"__type": "AddedToken"})
        for role in ROLES
        if rng.random() < 0.2 and (gpt2 or role != "unk_token")
    }
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if rng.random() < 0.2:
            fields[key] = [names({"__type": "AddedToken"}) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.3:
        numbered = enumerate(rng.sample(free, rng.randint(1, 4)), base)
        fields["added_tokens_decoder"] = {str(i): random_token(rng, content, {}) for i, content in numbered}
    options = (
        "add_bos_token",
        "add_prefix_space",
        "do_lower_case",
        "strip_accents",
        "tokenize_chinese_chars",
        "split_special_tokens",
    )
    fields |= {option: rng.random() < 0.5 for option in options if rng.random() < 0.15}
    if rng.random() < 0.5:
        fields["tokenizer_class"] = rng.choice([*classes, "PreTrainedTokenizerFast"] if new else classes)
    files: dict[str, Any] = {"config.json": GPT2 if gpt2 else BERT_MODEL, "tokenizer_config.json": fields}
    if new:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        added = [
            token(c, i, **{f: rng.random() < 0.3 for f in flags})
            for i, c in enumerate(rng.sample(free, rng.randint(0, 3)), base)
        ]
        normalizer = rng.choice(
            [None, {"type": "NFC"}, {"type": "Lowercase"}, bert_normalizer(strip_accents=False)]
        )
        files["tokenizer.json"] = (spec_of if gpt2 else wordpiece_spec)(*added, normalizer=normalizer)
    else:
        files |= (
            {"vocab.json": VOCABULARY, "merges.txt": LINES} if gpt2 else {"vocab.txt": "\n".join(ENTRIES)}
        )
        if rng.random() < 0.3:
            files["added_tokens.json"] = {
                content: i for i, content in enumerate(rng.sample(free, rng.randint(1, 3)), base)
            }
    if rng.random() < 0.3:
        more = {"additional_special_tokens": rng.sample(NAMES, 2)} if rng.random() < 0.5 else {}
        files["special_tokens_map.json"] = {role: names({}) for role in rng.sample(ROLES[3:7], 2)} | more
    return files


@pytest.mark.slow
@pytest.mark.parametrize("time", range(5))
def test_random_folders_give_the_ids_of_transformers(tmp_path, time):
    """Folders that transformers itself cannot read are left out."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )
    seed, compared = new_seed(), 0
    for i in range(100):
        rng = random.Random(seed + i)
        folder = write_files(tmp_path / str(i), random_folder(rng))
        texts = [odd_text(rng) for _ in range(50)]
        try:
            wanted = transformers.AutoTokenizer.from_pretrained(folder)(texts).input_ids
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            continue
        compared += 1
        check_ids(load_huggingface_tokenizer(folder), tuple(texts), wanted)
    assert compared > 50


@every_folder
def test_saved_tokenizers_come_back_with_the_same_ids(tmp_path, name):
    tokenizer, texts = load_huggingface_tokenizer(write(tmp_path / "there", name)), odd_texts(3, 100)
    tokenizer.save(tmp_path)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())), tmp_path)
    assert (again.vocab_size, again.end_of_text, type(again)) == (
        tokenizer.vocab_size,
        tokenizer.end_of_text,
        type(tokenizer),
    )
    assert again.to_json() == tokenizer.to_json()
    check_ids(again, texts, [whole(tokenizer, text) for text in texts])


@every_folder
def test_streamed_text_is_the_decoded_text(tmp_path, name):
    tokenizer = load_huggingface_tokenizer(write(tmp_path, name))
    for text in odd_texts(4, 100):
        ids, stream = tokenizer.encode(text), StreamDecoder(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
        if (
            type(tokenizer) is BytePairTokenizer
            and not any(tokenizer.frame)
            and name in ("old files", "single words", "digits")
        ):
            assert tokenizer.decode(ids) == text


@every_folder
def test_tokens_of_pieces_are_those_of_the_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data_pieces, "AHEAD", 300)
    tokenizer, rng = load_huggingface_tokenizer(write(tmp_path, name)), random.Random(5)
    alphabets = [
        ODD,
        [
            "special token",
            "<mask>",
            " ",
            "  ",
            "\n",
            "foo",
            "newword",
            "東",
            "ab",
            "abc",
            "e",
            "\u0301",
            "한",
        ],
        ["a", "b", "c"],
    ]
    for size, words in zip((1, 7, 50, 400, 1000), [*alphabets, *alphabets], strict=False):
        text = "".join(rng.choice(words) + rng.choice(SPACES if words is ODD else [""]) for _ in range(1500))
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        some = list(encode_pieces(tokenizer, pieces))
        assert [i for ids in some for i in ids] == tokenizer.encode(text)
        # Which adds a space after every cut but one before a space.
        assert len(some) > 4 or name == "add_prefix_space"


def test_end_of_text_that_only_the_class_names_ends_no_document(tmp_path):
    """transformers adds a token for it, whose row no model has."""
    vocabulary = {entry: i for entry, i in VOCABULARY.items() if entry != END}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text(LINES)
    tokenizer = load_huggingface_tokenizer(tmp_path)
    assert tokenizer.encode(END) == [419] and tokenizer.end_of_text is None
    again = tokenizer_from_json({"kind": "huggingface"}, saved_by_an_earlier_version(tmp_path))
    assert again.vocab_size == 419 and len(again.encode(END)) > 5


def saved_by_an_earlier_version(folder: Path) -> Path:
    """Its tokenizer's files in a folder of their own; its config.json named no class."""
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((folder / name).read_bytes())
    return folder


def test_missing_bytes_are_named_on_both_engines(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(without_bytes(unk_token=None)))
    with pytest.raises(LamaError, match=r"bytes that the vocabulary has; got 0x7a in 'low z'"):
        load_huggingface_tokenizer(tmp_path).encode("low z")
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(without_bytes(unk_token=None) | {"normalizer": {"type": "NFC"}})
    )
    with pytest.raises(
        LamaError, match=r"bytes that the vocabulary has; got 0xc3 in 'low e\\u0301'|got 0xc3 in 'low é'"
    ):
        load_huggingface_tokenizer(tmp_path).encode("low é")


def test_bert_reads_its_folder_and_no_other(tmp_path):
    folder = write(tmp_path / "bert", "BERT with added tokens")
    tokenizer = load_wordpiece_tokenizer(folder)
    assert [tokenizer.vocabulary[i] for i in tokenizer.framed("low <e1>!")] == [
        "[CLS]",
        "low",
        "<e1>",
        "!",
        "[SEP]",
    ]
    assert tokenizer.vocab_size == N + 3 and N not in tokenizer.encode_ordinary("low <e1>!")
    with pytest.raises(LamaError, match=r"a BERT must have its vocab\.txt, or a WordPiece tokenizer\.json"):
        load_wordpiece_tokenizer(write(tmp_path / "nfc", "NFC"))
