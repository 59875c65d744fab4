"""Text to ids and back: exact ids, every kind of text, broken files."""

import ast
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lama.errors import LamaError
from lama.tokenizers import (
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    Tokenizer,
    bpe,
    gpt2_tokenizer,
    load_huggingface_tokenizer,
    tokenizer_from_json,
)

TEXTS = [
    "",
    "How can entropy be reversed?",
    "naïve Ærøskøbing, 東京, Ω\u0301, \U0001f468\u200d\U0001f469\u200d\U0001f467, عربى",
    " two  spaces\n\n\ttab\r\n\u00a0\u3000 and the end   ",
    "\x00\x7f\ufffd\ufeff\U0010ffff",
    "it's I'LL we'd 12345 x=3.14; <|endoftext|> <|endoftext",
]


# --- bytes and characters


def test_byte_tokenizer_spells_utf8():
    assert ByteTokenizer().encode("aé") == [97, 195, 169]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokenizer_returns_the_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("ab"), gpt2_tokenizer()])
def test_tokenizers_refuse_lone_surrogates_by_place(tokenizer: Tokenizer):
    with pytest.raises(LamaError, match=r"valid Unicode; got '\\udcff' at character 2"):
        tokenizer.encode("ab\udcff")


@pytest.mark.parametrize(
    ("tokenizer", "bad"), [(ByteTokenizer(), 256), (CharacterTokenizer("abc"), -1), (gpt2_tokenizer(), 50257)]
)
def test_tokenizers_name_an_unknown_id(tokenizer: Tokenizer, bad: int):
    with pytest.raises(LamaError, match=rf"got id={bad}, vocab_size={tokenizer.vocab_size}"):
        tokenizer.decode([0, bad])


def test_character_tokenizer_numbers_the_characters_of_a_corpus():
    tokenizer = CharacterTokenizer("banana")
    assert (tokenizer.characters, tokenizer.vocab_size) == ("abn", 3)
    assert tokenizer.encode("nab") == [2, 0, 1]
    assert tokenizer.decode([2, 0, 1]) == "nab"


def test_character_tokenizer_names_an_unknown_character():
    with pytest.raises(LamaError, match=r"3 characters 'abn'; got 'é' at character 3"):
        CharacterTokenizer("banana").encode("bané")


def test_character_tokenizer_refuses_an_empty_corpus():
    with pytest.raises(LamaError, match="at least one character"):
        CharacterTokenizer("")


# --- GPT-2


def test_gpt2_ids_are_the_published_ones():
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("How can entropy be reversed?") == [2437, 460, 40709, 307, 17687, 30]


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_returns_the_text(text):
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_gpt2_encode_reads_end_of_text_as_a_token():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert tokenizer.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


def test_gpt2_survives_long_runs_of_one_character():
    tokenizer = gpt2_tokenizer()
    for text in ("x" * 100_000, " " * 100_000 + "x", "\n" * 100_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_refuses_what_would_make_tiktoken_panic():
    with pytest.raises(LamaError, match="less than a million white-space characters"):
        gpt2_tokenizer().encode(" " * 3_000_000 + "x")


def test_gpt2_pattern_and_hash_are_tiktokens_own():
    found = importlib.util.find_spec("tiktoken_ext.openai_public")
    assert found is not None and found.origin is not None
    strings = {
        node.value
        for node in ast.walk(ast.parse(Path(found.origin).read_text()))
        if isinstance(node, ast.Constant)
    }
    assert bpe.GPT2_VOCABULARY_SHA256 in strings
    assert bpe.GPT2_PATTERN in strings


def test_importing_tokenizers_leaves_tiktoken_and_tinygrad_alone():
    code = "import sys, lama.tokenizers; assert not {'tiktoken', 'tinygrad', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"#version: 0.2\nh e\n", mtime=0), "must have SHA-256"),
        (b"not gzip", "must be readable"),
        (gzip.compress(bytes(range(256)) * 9, mtime=0)[:-20], "must be readable"),
    ],
)
def test_gpt2_refuses_an_altered_vocabulary(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(bpe, "GPT2_VOCABULARY", tmp_path / "vocab.bpe.gz")
    bpe.GPT2_VOCABULARY.write_bytes(content)
    with pytest.raises(LamaError, match=message):
        bpe._gpt2_ranks()


# --- Hugging Face folders. Vocabulary: the 256 bytes in GPT-2's order, then " t", "th", "he", "the" made of
# th + e.

MERGES = ["Ġ t", "t h", "h e", "th e"]


def small_tokenizer(shuffled: bool = False) -> dict:
    tokens = list(bpe.byte_alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    # 263 is prime: all different, with gaps.
    ids = [(7 * i) % 263 for i in range(260)] if shuffled else list(range(260))
    return {
        "added_tokens": [{"content": "<|endoftext|>", "id": 300, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": dict(zip(tokens, ids, strict=True)), "merges": MERGES},
    }


def load(folder: Path, spec: object) -> BytePairTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return load_huggingface_tokenizer(folder)


def test_huggingface_merges_in_order_and_maps_ids(tmp_path):
    spec = small_tokenizer(shuffled=True)
    ids = spec["model"]["vocab"]
    tokenizer = load(tmp_path, spec)
    assert tokenizer.encode("the") == [ids["the"]]
    assert tokenizer.encode(" the") == [ids["Ġt"], ids["he"]]
    assert tokenizer.encode("he<|endoftext|>") == [ids["he"], 300]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (301, 300)


@pytest.mark.parametrize("text", TEXTS)
def test_huggingface_returns_the_text(tmp_path, text):
    tokenizer = load(tmp_path, small_tokenizer(shuffled=True))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_huggingface_reads_merges_written_as_pairs(tmp_path):
    spec = small_tokenizer()
    spec["model"]["merges"] = [merge.split() for merge in MERGES]
    assert load(tmp_path, spec).encode("the") == [259]


def test_huggingface_reads_vocab_and_merges_files(tmp_path):
    vocabulary = small_tokenizer()["model"]["vocab"] | {"<|endoftext|>": 260, "</s>": 261}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    tokenizer = load_huggingface_tokenizer(tmp_path)
    assert tokenizer.encode("the<|endoftext|>") == [259, 260]
    assert tokenizer.end_of_text == 260
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_huggingface_tokenizer(tmp_path).end_of_text == 261


def test_huggingface_added_tokens_take_their_white_space(tmp_path):
    spec = small_tokenizer()
    spec["added_tokens"].append({"content": "<mask>", "id": 301, "lstrip": True, "rstrip": True})
    assert load(tmp_path, spec).encode("h \n<mask> h") == [71, 301, 71]


def test_huggingface_prefers_the_longest_added_token(tmp_path):
    spec = small_tokenizer()
    spec["added_tokens"] += [{"content": "<a", "id": 301}, {"content": "<a>", "id": 302}]
    assert load(tmp_path, spec).encode("<a><a") == [302, 301]


def test_huggingface_adds_a_prefix_space_where_asked(tmp_path):
    spec = small_tokenizer()
    spec["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = load(tmp_path, spec)
    assert tokenizer.encode("the") == tokenizer.encode(" the") == [256, 258]


def test_huggingface_names_a_byte_the_vocabulary_lacks(tmp_path):
    spec = small_tokenizer()
    del spec["model"]["vocab"]["z"]
    tokenizer = load(tmp_path, spec)
    assert tokenizer.encode("the") == [259]
    with pytest.raises(LamaError, match=r"bytes that the vocabulary has; got 0x7a in 'a z'"):
        tokenizer.encode("a z")


def edited(path: str, value: object) -> dict:
    spec = small_tokenizer()
    *parents, last = path.split(".")
    part = spec
    for name in parents:
        part = part[name]
    part[last] = value
    return spec


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.type", "Unigram", "model.type must be BPE or WordPiece; got Unigram"),
        (
            "normalizer",
            {"type": "Foo"},
            "normalizer must be one that the library tokenizers knows; got {'type': 'Foo'}",
        ),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer must be ByteLevel; got Whitespace"),
        ("pre_tokenizer", None, "pre_tokenizer must be ByteLevel; got null"),
        (
            "post_processor",
            {"type": "TemplateProcessing"},
            "post_processor must put known ids around one text; got {'type': 'Temp",
        ),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": []}}], "special_tokens": {}},
            "post_processor must put known ids around one text; got {'type': 'Temp",
        ),
        ("model.dropout", 0.1, r"model.dropout must be off; got 0\.1"),
        ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix must be off; got </w>"),
        ("model.merges", ["Ġ t", "th"], "a merge must be two tokens; got 'th', merge 1"),
        ("model.merges", ["Ġ t", "Ġ q"], "must be in the vocabulary; got 'Ġ q', merge 1 of .*, without 'Ġq'"),
        ("model.merges", None, "merges in .* must be a list; got None"),
        ("model.vocab", {"a": "b"}, "every token an id from 0 to 16,777,215; got 'a': 'b'"),
        ("model.vocab", [], r"vocab in .* must be an object; got \[\]"),
        ("model.vocab", {}, "a vocabulary must not be empty"),
        ("added_tokens", [{"content": "<a>"}], "must have content and an id"),
    ],
)
def test_huggingface_refuses_by_name(tmp_path, path, value, message):
    with pytest.raises(LamaError, match=message):
        load(tmp_path, edited(path, value))


def test_huggingface_refuses_what_is_not_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(LamaError, match=r"tokenizer.json must be valid JSON; got Expecting value"):
        load_huggingface_tokenizer(tmp_path)


def test_huggingface_names_the_missing_files(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        LamaError,
        match=r"must hold tokenizer.json, or vocab.json and merges.txt, or vocab.txt; got vocab.json in",
    ):
        load_huggingface_tokenizer(tmp_path)
    with pytest.raises(LamaError, match=r"must be a folder; got .*nowhere"):
        load_huggingface_tokenizer(tmp_path / "nowhere")


@pytest.mark.peers
@pytest.mark.parametrize("prefix", [False, True])
def test_huggingface_ids_equal_those_of_tokenizers(tmp_path, prefix):
    hf = pytest.importorskip("tokenizers", reason="the package tokenizers (extra `peers`) is not installed")
    reference = hf.Tokenizer(hf.models.BPE())
    reference.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=509,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = Path(bpe.__file__).read_text(encoding="utf-8")
    reference.train_from_iterator([source], trainer)
    reference.add_tokens(["def", hf.AddedToken("<mask>", lstrip=True, special=True)])
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_huggingface_tokenizer(tmp_path)
    for text in [*TEXTS, source, "aaaaaaa abababa a<mask> def<pad>undefined <mask>"]:
        assert tokenizer.encode(text) == reference.encode(text).ids


# --- saving, streaming


@pytest.mark.parametrize("kind", ["bytes", "character", "gpt2", "huggingface"])
def test_tokenizers_come_back_from_a_folder(tmp_path, kind):
    tokenizer: Tokenizer = {
        "bytes": ByteTokenizer,
        "character": lambda: CharacterTokenizer("banana the\U0001f600"),
        "gpt2": gpt2_tokenizer,
        "huggingface": lambda: load(tmp_path, small_tokenizer(shuffled=True)),
    }[kind]()
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())), saved)
    assert tokenizer.to_json()["kind"] == kind
    assert again.encode("the banana") == tokenizer.encode("the banana")
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


@pytest.mark.parametrize(
    "spec", [{}, {"kind": "wordpiece"}, {"kind": "character"}, {"kind": "character", "characters": "ba"}]
)
def test_tokenizer_from_json_refuses_other_specs(tmp_path, spec):
    with pytest.raises(LamaError, match="a tokenizer's"):
        tokenizer_from_json(spec, tmp_path)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), gpt2_tokenizer()])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_decoder_never_breaks_a_character(tokenizer: Tokenizer, text: str):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_stream_decoder_holds_a_character_back_until_it_is_whole():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(token) for token in "é!".encode()] == ["", "é", "!"]
    assert [stream.push(0xE2), stream.push(0x82), stream.flush()] == ["", "", "\ufffd"]
    assert [stream.push(0xFF), stream.push(65)] == ["\ufffd", "A"]
