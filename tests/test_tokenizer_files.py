"""Tokenizer files as they are found: what names a token, what frames a text, what is damaged. Each value by
hand.

Vocabulary: the 256 bytes in GPT-2's order ("!" is 0, "a" 64, the space 220), then th, he, the, ab, and END as
260.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tokenizer_parity import AS_IT_STANDS, ENTRIES, bert_normalizer, template, token, wordpiece_spec

from lama.checkpoints import export_huggingface, load, save
from lama.data import text_corpus, tokenize
from lama.data.pieces import AHEAD
from lama.errors import LamaError
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import (
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    WordTokenizer,
    bpe,
    encode_inside,
    huggingface_files,
    load_huggingface_tokenizer,
    load_wordpiece_tokenizer,
    tokenizer_from_json,
    train_bpe,
)
from lama.tokenizers.base import Common
from lama.tokenizers.special import LONGEST
from lama.tokenizers.training import learn_merges

END = "<|endoftext|>"
MERGES = ["t h", "h e", "th e", "a b"]
BYTES = {symbol: i for i, symbol in enumerate(bpe.byte_alphabet())}
VOCABULARY = BYTES | {merge.replace(" ", ""): 256 + i for i, merge in enumerate(MERGES)} | {END: 260}
LINES = "\n".join(["#version: 0.2", *MERGES, ""])
OLD = {"vocab.json": VOCABULARY, "merges.txt": LINES}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def spec_of(*added: dict[str, Any], **parts: Any) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": VOCABULARY, "merges": MERGES}
    tokens = [token(END, 260, special=True), *added]
    return {
        "version": "1.0",
        "added_tokens": tokens,
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    } | parts


def folder_of(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        (folder / name).write_bytes(data)
    return folder


def config(**fields: Any) -> dict[str, Any]:
    return OLD | {"tokenizer_config.json": fields}


@pytest.mark.parametrize(
    ("text", "files", "ids"),
    [
        ("x\n\n\ny", {"tokenizer.json": spec_of(token("\n", 261, rstrip=True))}, [87, 261, 261, 261, 88]),
        ("x  foo a", {"tokenizer.json": spec_of(token(" foo", 261, lstrip=True))}, [87, 261, 220, 64]),
        ("a\x1c<mask>", {"tokenizer.json": spec_of(token("<mask>", 261, lstrip=True))}, [64, 216, 261]),
        ("a\x85\u2028<mask>", {"tokenizer.json": spec_of(token("<mask>", 261, lstrip=True))}, [64, 261]),
        ("the", {"tokenizer.json": spec_of(post_processor=template("A"))}, [258]),
        ("the", {"tokenizer.json": spec_of(normalizer={"type": "Sequence", "normalizers": []})}, [258]),
        ("a <s1>b", config(additional_special_tokens=["<s1>"]), [64, 220, 261, 65]),
        ("a <s1>b", config(image_token="<s1>"), [64, 220, 261, 65]),
        ("<usr>a", config(added_tokens_decoder={"261": token("<usr>")}), [261, 64]),
        ("a  <mask>", config(mask_token={"__type": "AddedToken"} | token("<mask>", lstrip=True)), [64, 261]),
        (
            "a  <m>",
            OLD | {"special_tokens_map.json": {"mask_token": {"content": "<m>", "lstrip": True}}},
            [64, 261],
        ),
        ("<n>a", OLD | {"added_tokens.json": {"<n>": 261}}, [261, 64]),
        ("the", config(add_bos_token=True), [260, 258]),
        ("the", config(add_bos_token=True, bos_token="<s>", add_eos_token=True), [261, 258, 260]),
        ("the", config(add_bos_token=True, bos_token=None), [258]),
        ("the", OLD | {"merges.txt": LINES.replace("\n", "\r\n")}, [258]),
        (
            "abc",
            {"vocab.json": BYTES | {"ab": 256, "bc": 257, "abc": 258}, "merges.txt": "a b\nb c\na bc\n"},
            [256, 66],
        ),
        (
            "the",
            {"tokenizer.json": spec_of(token("<s>", 261), post_processor=template("s", "A", "s", s=261))},
            [261, 258, 261],
        ),
        ("thee", {"tokenizer.json": spec_of(token("the", 261, single_word=True))}, [258, 68]),
    ],
)
def test_ids_are_the_right_ones(tmp_path, text, files, ids):
    assert load_huggingface_tokenizer(folder_of(tmp_path, files)).encode(text) == ids


def test_bert_options_of_its_files_are_obeyed(tmp_path):
    def spelled(files: dict[str, Any]) -> list[str]:
        tokenizer = load_wordpiece_tokenizer(folder_of(tmp_path, files))
        return [tokenizer.vocabulary[i] for i in tokenizer.encode("Über 中東")]

    lines = {"vocab.txt": "\n".join(ENTRIES)}
    assert spelled(lines) == ["uber", "中", "東"]
    assert spelled(lines | {"tokenizer_config.json": {"strip_accents": False}}) == ["über", "中", "東"]
    assert spelled(lines | {"tokenizer_config.json": {"do_lower_case": False}}) == ["Über", "中", "東"]
    assert spelled(lines | {"tokenizer_config.json": {"tokenize_chinese_chars": False}}) == ["uber", "[UNK]"]
    (tmp_path / "vocab.txt").unlink()
    options = {"strip_accents": False, "handle_chinese_chars": False}
    assert spelled({"tokenizer.json": wordpiece_spec(normalizer=bert_normalizer(**options))}) == [
        "über",
        "[UNK]",
    ]
    with pytest.raises(
        LamaError, match=r"do_lower_case in .*tokenizer_config.json must be true or false; got 'false'"
    ):
        spelled(
            lines | {"tokenizer_config.json": {"do_lower_case": "false", "tokenizer_class": "BertTokenizer"}}
        )


def test_bert_ids_are_those_of_the_file_where_they_have_gaps(tmp_path):
    spec = wordpiece_spec(vocab={entry: 3 * i for i, entry in enumerate(ENTRIES)})
    tokenizer = load_wordpiece_tokenizer(folder_of(tmp_path, {"tokenizer.json": spec}))
    assert tokenizer.encode("the low [MASK]") == [15, 18, 12] and tokenizer.vocab_size == 3 * len(ENTRIES) - 2
    assert tokenizer.decode([15, 16, 18]) == " the low"


def test_ids_of_added_tokens_are_those_of_the_file_where_they_are_free(tmp_path):
    spec = spec_of(token("<a>", 70_000), token("<b>", 5), normalizer={"type": "NFC"})
    assert load_huggingface_tokenizer(folder_of(tmp_path, {"tokenizer.json": spec})).encode("<a>a<b>") == [
        70_000,
        64,
        70_001,
    ]


def test_a_frame_stands_around_a_whole_text_only(tmp_path):
    tokenizer = load_huggingface_tokenizer(folder_of(tmp_path, config(add_bos_token=True)))
    assert (tokenizer.encode(""), tokenizer.encode_ordinary("the")) == ([260], [260, 258])
    assert encode_inside(tokenizer, "the") == [258] and encode_inside(ByteTokenizer(), "a") == [97]
    files = tokenize(text_corpus("the " * 30_000, "some"), tokenizer, tmp_path / "data")
    assert (files.train[:3].tolist(), np.count_nonzero(files.train == 260)) == ([260, 258, 220], 1)


def test_corpus_keeps_an_added_token_over_the_end_of_a_piece(tmp_path):
    assert AHEAD > 3 * LONGEST  # a cut sees the whole of any added token
    n = 1 << 20
    text = "word " * ((n - 10) // 5)
    text += "x" * (n - 3 - len(text) - 13) + " special token and more " * 3
    tokenizer = load_huggingface_tokenizer(
        folder_of(tmp_path, {"tokenizer.json": spec_of(token("special token", 261))})
    )
    files = tokenize(text_corpus(text, "some"), tokenizer, tmp_path / "data")
    assert np.concatenate([files.train, files.validation]).tolist() == tokenizer.encode(text)
    assert np.count_nonzero(files.validation == 261) == 3


@pytest.mark.parametrize(
    "text",
    [
        "東京は日本の首都" * 20_000,
        "ab" * 80_000,
        "a" * 70_000 + " " * 70_000 + "<mask>" + "\n" * 70_000 + "b",
    ],
)
def test_corpus_without_spaces_has_the_tokens_of_the_whole(tmp_path, text):
    spec = spec_of(token("<mask>", 261, lstrip=True, rstrip=True))
    tokenizer = load_huggingface_tokenizer(folder_of(tmp_path, {"tokenizer.json": spec}))
    files = tokenize(text_corpus(text, "some"), tokenizer, tmp_path / "data")
    assert np.concatenate([files.train, files.validation]).tolist() == tokenizer.encode(text)


def test_gpt2_with_bert_vocabulary_loads_and_is_exported(tmp_path):
    model = GPT(GPTConfig(len(ENTRIES), context_length=8, d_model=4, n_layers=1, n_heads=1), seed=0)
    export_huggingface(tmp_path / "1", model, CharacterTokenizer("ab"))
    fields = json.loads((tmp_path / "1" / "config.json").read_text()) | {"tokenizer_class": "BertTokenizer"}
    folder_of(tmp_path / "1", {"vocab.txt": "\n".join(ENTRIES), "config.json": fields})
    ids = [
        [ENTRIES.index(entry) for entry in entries]
        for entries in (["low", "##er", "中"], ["[CLS]", "low", "##er", "中", "[SEP]"])
    ]
    model, tokenizer = load(tmp_path / "1")
    export_huggingface(tmp_path / "2", model, tokenizer)
    save(tmp_path / "3", model, tokenizer)
    for folder in "123":
        tokenizer = load(tmp_path / folder)[1]
        assert [tokenizer.encode("Lower中"), tokenizer.framed("Lower中")] == ids


@pytest.mark.peers
def test_exported_bytes_give_transformers_the_same_ids(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )
    model = GPT(GPTConfig(256, context_length=8, d_model=4, n_layers=1, n_heads=1), seed=0)
    export_huggingface(tmp_path / "hf", model, ByteTokenizer())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = f"a{END}b é\n\x00 [PAD] <unk>"
    assert theirs(text).input_ids == list(text.encode()) and len(theirs) == 256
    assert load_huggingface_tokenizer(tmp_path / "hf").encode(text) == list(text.encode())


@pytest.mark.peers
def test_exported_tokenizers_give_transformers_the_same_ids(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )
    nfc = load_huggingface_tokenizer(
        folder_of(tmp_path / "nfc", {"tokenizer.json": spec_of(normalizer={"type": "NFC"})})
    )
    text = f"the[PAD]{END} cafe\u0301 [MASK]ab"
    for i, tokenizer in enumerate(
        [nfc, train_bpe("the ab the ab", 259, ["[PAD]", "[MASK]"]), train_bpe("the ab", 257, [])]
    ):
        files = huggingface_files(tokenizer) | {"config.json": b'{"model_type": "gpt2"}'}
        theirs = transformers.AutoTokenizer.from_pretrained(folder_of(tmp_path / str(i), files))
        assert theirs(text).input_ids == tokenizer.encode(text) and len(theirs) == tokenizer.vocab_size


# --- merges


def random_merges(rng: random.Random) -> list[str]:
    tokens, merges = list("abc"), []
    for _ in range(rng.randint(1, 9)):
        first, second = rng.choice(tokens), rng.choice(tokens)
        if first + second not in tokens:
            merges.append(f"{first} {second}")
            tokens.append(first + second)
    return merges


def test_merges_of_one_training_give_the_ids_of_the_library_on_tiktokens_engine(tmp_path):
    """Where `is_one_training` says so; it says so of every training."""
    import tokenizers as hf

    found = 0
    for seed in range(400):
        rng = random.Random(seed)
        merges = random_merges(rng)
        if not bpe.is_one_training(merges):
            continue
        found += 1
        vocabulary = BYTES | {merge.replace(" ", ""): 256 + i for i, merge in enumerate(merges)}
        theirs = hf.Tokenizer(
            hf.models.BPE(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])
        )
        ranks = bpe.ranks_of(merges)
        mine = BytePairTokenizer(ranks, [], Common())
        for _ in range(20):
            text = "".join(rng.choices("abc", k=rng.randint(1, 14)))
            assert mine.encode(text) == theirs.encode(text).ids, (merges, text)
    assert found > 200
    for seed in range(100):
        rng = random.Random(seed)
        counts = {
            "".join(rng.choices("abc"[: rng.randint(1, 3)], k=rng.randint(1, 30))): rng.randint(1, 9)
            for _ in range(9)
        }
        assert bpe.is_one_training([" ".join(merge) for merge in learn_merges(counts)])


def test_check_of_merges_runs_once_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bpe, "CHECKED_AT_ONCE", 1)
    calls, check = [], bpe._is_one_training
    monkeypatch.setattr(bpe, "_is_one_training", lambda merges: calls.append(merges) or check(merges))
    glued = ["a b", "b c", "a bc"]
    for _ in range(3):
        assert bpe.is_one_training(MERGES) and not bpe.is_one_training(glued)
    assert calls == [MERGES, glued]
    for path in (tmp_path / "lama" / "merges").iterdir():
        path.write_bytes(b"?")
    assert not bpe.is_one_training(glued)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert bpe.is_one_training(MERGES)


def test_gpt2_merges_are_known_and_of_one_training():
    merges = bpe._gpt2_merges().decode().split("\n")[1:-1]
    assert bpe._is_one_training(merges)
    assert bpe.hashlib.sha256("\n".join(merges).encode()).hexdigest() == bpe.GPT2_MERGES_SHA256


def test_embedded_model_reads_its_tokenizer_without_the_library():
    code = (
        "import sys; from pathlib import Path; from lama.tokenizers import tokenizer_from_json as f; "
        "t = f({'kind': 'huggingface'}, Path('weights/lama-bpe')); "
        "assert t.vocab_size == 4096 and 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# --- files that lie


def damaged() -> list[tuple[str, dict[str, Any]]]:
    """Files of which each part in turn is something else."""
    fast = {"tokenizer_config.json": AS_IT_STANDS}
    values: list[Any] = [
        7,
        "x",
        "false",
        [],
        {},
        [1],
        [None],
        {"type": [1]},
        {"content": 5},
        {"content": "z" * 20_000},
        {"0": "x"},
    ]
    values += [
        {"type": "Sequence", "normalizers": 5, "pretokenizers": 5, "processors": 5},
        [{"content": "a", "id": -1}],
    ]
    values += [
        {"type": "Sequence", "normalizers": [None], "pretokenizers": [5], "processors": [[]]},
        [{"content": "a", "id": None}],
    ]
    values += [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "a"}}],
            "special_tokens": {"a": {"ids": 5}},
        }
    ]
    values += [
        {"type": "BertProcessing", "cls": ["x", []], "sep": ["y", 10**8]},
        {"99999999999999999999": {"content": "<q>"}},
    ]
    values += [{"type": "Metaspace"}, {"a": 10**9}, {"a": None}, "z" * 20_000, True, None]
    roles = (
        "eos_token",
        "unk_token",
        "image_token",
        "extra_special_tokens",
        "additional_special_tokens",
        "added_tokens_decoder",
    )
    options = (
        "add_prefix_space",
        "add_bos_token",
        "do_lower_case",
        "strip_accents",
        "split_special_tokens",
        "tokenizer_class",
    )
    of_model = (
        "vocab",
        "merges",
        "unk_token",
        "continuing_subword_prefix",
        "max_input_chars_per_word",
        "type",
        "fuse_unk",
        "dropout",
    )
    parts = (
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "added_tokens",
        "decoder",
        "model",
        "truncation",
    )
    older = {"vocab.txt": "\n".join(ENTRIES), "added_tokens.json": {"<n>": len(ENTRIES)}}
    cases: list[tuple[str, dict[str, Any]]] = []
    for value in values:
        for key in parts:
            cases += [
                (key, fast | {"tokenizer.json": spec | {key: value}})
                for spec in (spec_of(), wordpiece_spec())
            ]
        for key in of_model:
            specs = spec_of(model=spec_of()["model"] | {key: value}), wordpiece_spec(**{key: value})
            cases += [(key, fast | {"tokenizer.json": spec}) for spec in specs]
        for key in (*roles, *options):
            cases += [(key, config(**{key: value})), (key, older | {"special_tokens_map.json": {key: value}})]
        cases += [
            (name, OLD | {name: value})
            for name in ("vocab.json", "added_tokens.json", "tokenizer_config.json", "config.json")
        ]
    return cases


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_files_load_or_are_one_clear_line(tmp_path, every):
    refused = 0
    for i, (key, files) in enumerate(damaged()[::every]):
        folder = folder_of(tmp_path / str(i), files)
        try:
            tokenizer = load_huggingface_tokenizer(folder)
            ids = tokenizer.encode("the <x> b\x00 é[MASK]")
            assert tokenizer.vocab_size < 1 << 24 and max(ids) < tokenizer.vocab_size, (key, files)
            tokenizer.decode(ids), tokenizer.encode_ordinary("the")
        except LamaError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, (key, str(error))
    assert i / 4 < refused < i


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "[" * 100_000}, "over 100 levels"),
        (
            OLD | {"added_tokens.json": "[" * 100_000},
            r"added_tokens.json must be valid JSON; got over 100 levels",
        ),
        (OLD | {"tokenizer_config.json": '{"x": ' + "9" * 5000 + "}"}, "a whole number of 5,000 digits"),
        ({"vocab.json": '{"\\ud800": 5}', "merges.txt": ""}, r"half of a character, '\\ud800'"),
        (
            {"tokenizer.json": json.dumps(spec_of(token("Q", 261))).replace('"Q"', '"\\ud800"')},
            "half of a character",
        ),
        (
            OLD | {"merges.txt": "a" * 100_000},
            r"a merge must be two tokens; got '?a{190,200}'?\.\.\., merge 0",
        ),
        (OLD | {"merges.txt": b"\xff\xfe a"}, r"merges.txt must be UTF-8; got byte 0xff at offset 0"),
        (
            {"vocab.json": VOCABULARY | {"zz": 10**9}, "merges.txt": LINES},
            "an id from 0 to 16,777,215; got 'zz': 1000000000",
        ),
        ({"vocab.txt": "a\nb\n"}, r"must have its unk_token; got '\[UNK\]'"),
        ({"vocab.txt": b"\xff"}, "vocab.txt must be UTF-8"),
        (
            {"tokenizer.json": spec_of(model={"type": "Unigram", "vocab": []})},
            "model.type must be BPE or WordPiece; got Unigram",
        ),
        (
            {"tokenizer.json": spec_of(pre_tokenizer={"type": "Whitespace"})},
            "pre_tokenizer must be ByteLevel; got Whitespace",
        ),
        (
            {"tokenizer.json": spec_of(normalizer={"type": "Foo"})},
            "normalizer must be one that the library tokenizers knows",
        ),
        (
            {"tokenizer.json": spec_of(normalizer={"type": "Sequence", "normalizers": [DOUBLE] * 14})},
            "normalizer must write at most 10,000 characters in place of one; got 16384 in",
        ),
        (
            {"tokenizer.json": spec_of(token("z" * 20_000, 261))},
            "an added token must have 1 to 10,000 characters; got 'zzz",
        ),
        ({}, "got none of them in"),
    ],
)
def test_damaged_files_are_named(tmp_path, files, message):
    with pytest.raises(LamaError, match=message) as caught:
        load_huggingface_tokenizer(folder_of(tmp_path, files))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "character", "characters": "ab\ud800"},
        {"kind": "words", "entries": ["a", "\udfff"]},
        {"kind": "words", "entries": ["a" * 10_000, 5]},
        {"kind": "huggingface", "class": 5},
        {"kind": "pairs", "tokenizer": 5},
        {"kind": "x" * 10_000},
    ],
)
def test_damaged_specs_are_one_line(tmp_path, spec):
    with pytest.raises(LamaError) as caught:
        tokenizer_from_json(spec, tmp_path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda: CharacterTokenizer("a\ud800"), lambda: WordTokenizer(["\ud800"])])
def test_vocabularies_refuse_half_of_a_character(make):
    with pytest.raises(LamaError, match="valid Unicode"):
        make()
