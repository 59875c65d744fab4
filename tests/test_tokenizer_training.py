"""Byte-pair encoding learned from a text: the merges, the vocabulary, the folder, the command."""

import errno
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import regex

from lama.cli import main
from lama.errors import LamaError, UsageError
from lama.tokenizers import ByteTokenizer, load_huggingface_tokenizer, tokenizer_from_json, train_bpe
from lama.tokenizers.bpe import GPT2_PATTERN, byte_alphabet
from lama.tokenizers.training import base_symbols, count_words, learn_merges, spelled_out, trained_files

END = "<|endoftext|>"
SOURCE = Path(__file__).read_text(encoding="utf-8")
CORPORA = {
    "words": "low low low low low lower lower newest newest newest newest newest newest widest widest widest",
    "runs": "aaaaaaa aaa aaaa aa aaaaab baaaab ababab babababa aabaab\n\n\n\n\n\n   \n",
    "unicode": "naïve Ærøskøbing, 東京東京都, Ω\u0301, \U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "عربى عربى \U0010ffff\x01",
    "numbers": " ".join(str(i * i) for i in range(300)),
    "source": SOURCE[:6000],
}


def random_text(seed: int, length: int = 300) -> str:
    """Characters from everywhere in Unicode, many from a small alphabet, so that there is something to
    merge.
    """
    rng = random.Random(seed)
    few = [
        chr(rng.choice((rng.randrange(1, 0x80), rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000))))
        for _ in range(9)
    ]
    anywhere = [chr(rng.randrange(1, 0xD800)) for _ in range(length // 5)]
    return "".join(rng.choices(few, k=length) + anywhere + rng.choices(" \n'sté", k=length // 3))


def naive_merges(counts: dict[str, int], n: int) -> list[tuple[str, str]]:
    """The same rule, plainly: recount all pairs after every merge; the highest count, then the lowest ids."""
    names = list(byte_alphabet())
    id_of = {byte: i for i, byte in enumerate(byte_alphabet().values())}
    words = [([id_of[byte] for byte in word.encode()], times) for word, times in counts.items()]
    merges = []
    while len(merges) < n:
        totals: Counter[tuple[int, int]] = Counter()
        for ids, times in words:
            for pair in pairwise(ids):
                totals[pair] += times
        if not totals:
            break
        best = min(totals, key=lambda pair: (-totals[pair], pair))
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [len(names)]
                i += 1
        merges.append((names[best[0]], names[best[1]]))
        names.append("".join(merges[-1]))
    return merges


# --- the merges


def test_learn_merges_follows_sennrichs_example():
    counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3}  # section 3.2, without its end-of-word symbol
    assert list(islice(learn_merges(counts), 4)) == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]


def test_learn_merges_breaks_ties_by_the_lowest_ids():
    assert list(learn_merges({"zy": 1, "ba": 1, "bc": 1})) == [("b", "a"), ("b", "c"), ("z", "y")]


def test_learn_merges_counts_overlaps_and_merges_the_left_one():
    assert list(learn_merges({"aaa": 2, "xyz": 3})) == [("a", "a"), ("x", "y"), ("xy", "z"), ("aa", "a")]


@pytest.mark.parametrize("name", CORPORA)
def test_learn_merges_equals_a_recount_after_every_merge(name):
    counts = count_words(CORPORA[name])
    assert list(islice(learn_merges(counts), 400)) == naive_merges(counts, 400)


@pytest.mark.parametrize("seed", range(5))
def test_learn_merges_equals_a_recount_on_random_unicode_to_the_last_merge(seed):
    counts = count_words(random_text(seed))
    assert list(learn_merges(counts)) == naive_merges(counts, 10**6)


@pytest.mark.parametrize("seed", range(5))
def test_learn_merges_equals_a_recount_on_long_words_of_two_letters(seed):
    counts = {"".join(random.Random(seed + i).choices("ab", k=50)): i + 1 for i in range(7)}
    merges = list(learn_merges(counts))
    assert merges == naive_merges(counts, 10**6)
    assert len({"".join(merge) for merge in merges}) == len(merges)  # no token is made twice


def test_learn_merges_does_not_depend_on_the_order_of_the_words():
    counts = count_words(CORPORA["source"])
    assert list(learn_merges(counts)) == list(learn_merges(dict(sorted(counts.items()))))


# --- the tokenizer


def test_train_bpe_numbers_bytes_then_merges_then_special_tokens():
    tokenizer = train_bpe("low low lower", 262, [END, "<pad>"])  # lo, low, " low", and e + r
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (262, 260)
    assert tokenizer.encode(f"low{END}<pad>low") == [257, 260, 261, 257]
    assert tokenizer.encode("!é") == [0, 127, 102]
    assert [tokenizer.decode([i]) for i in (256, 257, 258, 259)] == ["lo", "low", " low", "er"]


@pytest.mark.parametrize("size", [257, 258, 300, 509])
def test_train_bpe_has_exactly_the_size_asked_for(size):
    tokenizer = train_bpe(SOURCE, size)
    vocabulary = json.loads(tokenizer.files["tokenizer/vocab.json"])
    assert sorted(vocabulary.values()) == list(range(size))
    assert tokenizer.vocab_size == size
    assert max(tokenizer.encode(SOURCE + END)) == size - 1


@pytest.mark.parametrize("seed", range(20))
def test_train_bpe_returns_any_unicode(seed):
    tokenizer = train_bpe(CORPORA["unicode"], 300)
    text = random_text(seed) + f" it's{END} 12 \x00\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert END.encode() in map(tokenizer._bytes.get, tokenizer.encode(text))


def test_train_bpe_tokens_never_cross_a_word():
    tokenizer = train_bpe(SOURCE, 700)
    words = regex.findall(GPT2_PATTERN, SOURCE)
    distinct = {word.encode() for word in words}
    for token in (tokenizer.decode_bytes([i]) for i in range(256, 699)):
        assert any(token in word for word in distinct), token
    assert tokenizer.encode_ordinary(SOURCE) == [i for word in words for i in tokenizer.encode_ordinary(word)]


def test_train_bpe_encodes_the_corpus_as_its_merges_left_it():
    counts = count_words(SOURCE)
    tokenizer = train_bpe(SOURCE, 509)
    ranks = {"".join(merge): merge for merge in learn_merges(counts)}
    tokens = list(ranks)[: 509 - 257]
    for word in counts:
        ids = [list(byte_alphabet().values()).index(byte) for byte in word.encode()]
        names = [list(byte_alphabet())[i] for i in ids]
        for token in tokens:  # every merge in turn, by hand
            i = 0
            while i < len(names) - 1:
                if (names[i], names[i + 1]) == ranks[token]:
                    names[i : i + 2] = [token]
                i += 1
        assert (
            spelled_out(tokenizer.encode(word), json.loads(tokenizer.files["tokenizer/vocab.json"])).split()
            == names
        )


def test_train_bpe_learns_nothing_from_special_tokens():
    assert count_words(f"ab{END}ab<pad>", [END, "<pad>"]) == {"ab": 2}
    assert count_words(f"ab{END}") == {"ab": 1, "<|": 1, "endoftext": 1, "|>": 1}
    assert base_symbols(f"b a{END}", [END]) == ["a", "b", "Ġ"]


def test_train_bpe_ends_a_text_with_endoftext_or_the_first_special_token():
    assert train_bpe("ab", 259, ["<pad>", END, "<x>"]).end_of_text == 257
    assert train_bpe("ab", 258, ["<stop>", "<pad>"]).end_of_text == 256
    assert train_bpe("ab", 257, []).end_of_text is None


def test_train_bpe_comes_back_from_a_checkpoint_folder(tmp_path):
    tokenizer = train_bpe(SOURCE, 400)
    tokenizer.save(tmp_path)
    again = tokenizer_from_json(tokenizer.to_json(), tmp_path)
    assert again.encode(SOURCE) == tokenizer.encode(SOURCE)


def test_train_bpe_shows_its_merges_as_they_come():
    seen = []
    train_bpe("low low lower", 260, progress=lambda merges: (seen.append(merge) or merge for merge in merges))
    assert seen == [("l", "o"), ("lo", "w"), ("Ġ", "low")]


@pytest.mark.parametrize(
    ("text", "size", "special", "error", "message"),
    [
        (
            "low",
            300,
            [END],
            LamaError,
            r"must yield 43 merges for a vocabulary of 300; got 2\. .* at most 259 entries",
        ),
        (
            "low",
            256,
            [END],
            UsageError,
            r"must have 257 entries \(256 bytes, 1 special\) to 1114112; got 256",
        ),
        ("low", -1, [], UsageError, "got -1"),
        ("low", 10**9, [], UsageError, "got 1000000000"),
        ("low", 300, [""], UsageError, "special token must be printable.*; got ''"),
        ("low", 300, ["a b"], UsageError, "special token must .*; got 'a b'"),
        ("low", 300, ["\udcff"], UsageError, r"special token must .*; got '\\udcff'"),
        ("low", 300, ["Ġ"], UsageError, "special token must .*; got 'Ġ'"),
        ("low", 300, ["<a>", "<b>", "<a>"], UsageError, "must differ from each other; got <a>, <b>, <a>"),
        (
            "low low",
            260,
            ["Ġlow"],
            UsageError,
            "must not be what the vocabulary calls another token; got 'Ġlow'",
        ),
        ("low\udcff", 260, [], LamaError, r"valid Unicode; got '\\udcff' at character 3"),
    ],
)
def test_train_bpe_refuses_by_name(text, size, special, error, message):
    with pytest.raises(error, match=message):
        train_bpe(text, size, special)


# --- the command


def run(tmp_path: Path, *words: str, text: str = SOURCE, out: str = "out") -> int:
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8", newline="")
    return main(["tokenizer", str(tmp_path / "corpus.txt"), *words, "--out", str(tmp_path / out)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_command_writes_the_folder_and_says_what_it_learned(tmp_path, capsys):
    assert run(tmp_path, "400") == 0
    out, err = capsys.readouterr()
    assert "400 entries" in out and "256 bytes, 143 merges, 1 special" in out
    assert "longest tokens: '" in out and " bytes per token" in out and "merge/s" in err
    files = contents(tmp_path / "out")
    assert sorted(files) == [
        "base.json",
        "lama.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokens.txt",
        "vocab.json",
    ]
    assert len(json.loads(files["vocab.json"])) == 400
    assert len(files["merges.txt"].splitlines()) == 1 + 143
    tokenizer = load_huggingface_tokenizer(tmp_path / "out")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (400, 399)
    assert tokenizer.encode(SOURCE) == train_bpe(SOURCE, 400).encode(SOURCE)


def test_command_writes_the_corpus_as_tokens(tmp_path):
    text = f"{CORPORA['unicode']}\n\n one{END}two \r\n"
    assert run(tmp_path, "280", text=text) == 0
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_bytes())
    tokens = (tmp_path / "out" / "tokens.txt").read_text(encoding="utf-8").split()
    ids = [vocabulary[token] for token in tokens]
    assert max(ids) < 280
    tokenizer = load_huggingface_tokenizer(tmp_path / "out")
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    base = json.loads((tmp_path / "out" / "base.json").read_bytes())
    assert sorted(byte_alphabet()[symbol] for symbol in base) == sorted(set(text.replace(END, "").encode()))


def test_command_reads_the_parts_without_tokenizer_json_alike(tmp_path):
    assert run(tmp_path, "400") == 0
    (tmp_path / "out" / "tokenizer.json").unlink()
    tokenizer = load_huggingface_tokenizer(tmp_path / "out")
    assert tokenizer.encode(SOURCE + END) == train_bpe(SOURCE, 400).encode(SOURCE + END)
    assert tokenizer.end_of_text == 399


def test_command_writes_the_same_bytes_again(tmp_path):
    (tmp_path / "corpus.txt").write_text(SOURCE, encoding="utf-8")
    for seed in ("1", "2"):  # of Python's hashes, which decide the order of sets of strings
        words = [
            "tokenizer",
            str(tmp_path / "corpus.txt"),
            "500",
            "--special",
            "<pad>",
            "--out",
            str(tmp_path / seed),
        ]
        subprocess.run(
            [sys.executable, "-m", "lama", *words],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
    first = contents(tmp_path / "1")
    assert first == contents(tmp_path / "2")
    assert run(tmp_path, "500", "--special", "<pad>", out="1") == 0  # over itself
    assert first == contents(tmp_path / "1")


def test_command_reads_standard_input(tmp_path):
    words = [sys.executable, "-m", "lama", "tokenizer", "-", "258", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, input="aé b aé".encode(), capture_output=True, check=True)
    assert b"longest tokens" in done.stdout
    assert (tmp_path / "out" / "tokens.txt").read_text(encoding="utf-8") == "aÃ © Ġ b Ġ aÃ ©\n"


def test_command_refuses_in_one_line_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    cases = [
        (("256",), {}, 2, "a vocabulary must have 257 entries"),
        (("9" * 5,), {}, 1, "the corpus must yield 99742 merges"),
        (("many",), {}, 2, "invalid int value: 'many'"),
        (("300", "--special", "a b"), {}, 2, "a special token must be printable"),
        (("300",), {"text": ""}, 1, "a corpus must hold some text"),
        (("300",), {"text": "a\x00b"}, 1, "binary file"),
        (("300",), {"out": "corpus.txt"}, 2, "--out must be a folder; got the file"),
        (("300",), {"out": "corpus.txt/below"}, 1, "--out must be a folder that can be written"),
        (("300",), {"out": "other"}, 2, "--out must be a new or empty folder"),
    ]
    for words, options, code, message in cases:
        assert run(tmp_path, *words, **options) == code
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("lama: ") and message in last
    assert main(["tokenizer", str(tmp_path / "nowhere"), "300", "--out", str(tmp_path / "out")]) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["corpus.txt", "notes.txt", "other"]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 1)]
)
def test_command_that_is_stopped_leaves_the_old_files(tmp_path, monkeypatch, capsys, error, code):
    assert run(tmp_path, "300") == 0
    before = contents(tmp_path / "out")

    def stop(*_):
        raise error

    monkeypatch.setattr("lama.atomic.os.fsync", stop)
    assert run(tmp_path, "310") == code
    assert contents(tmp_path / "out") == before


def test_command_that_is_interrupted_while_learning_leaves_nothing(tmp_path, monkeypatch):
    def stop(counts):
        yield "a", "b"
        raise KeyboardInterrupt

    monkeypatch.setattr("lama.tokenizers.training.learn_merges", stop)
    assert run(tmp_path, "300") == 130
    assert not (tmp_path / "out").exists()


# --- against the package tokenizers


@pytest.mark.peers
def test_trained_folder_gives_the_ids_of_tokenizers(tmp_path):
    hf = pytest.importorskip("tokenizers", reason="the package tokenizers (extra `peers`) is not installed")
    assert run(tmp_path, "500", "--special", END, "--special", "<pad>", text=SOURCE + CORPORA["unicode"]) == 0
    reference = hf.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokenizer = load_huggingface_tokenizer(tmp_path / "out")
    assert reference.get_vocab_size() == 500
    assert (reference.token_to_id(END), reference.token_to_id("<pad>")) == (498, 499)
    for text in [
        SOURCE,
        *CORPORA.values(),
        *map(random_text, range(30)),
        f"a{END} b<pad>c<|endoftext",
        " two  \n\n three ",
    ]:
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert reference.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids) == text


@pytest.mark.peers
def test_learn_merges_equals_those_of_tokenizers():
    hf = pytest.importorskip("tokenizers", reason="the package tokenizers (extra `peers`) is not installed")
    reference = hf.Tokenizer(hf.models.BPE())
    reference.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    reference.train_from_iterator(
        [SOURCE], hf.trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    theirs = [tuple(merge) for merge in json.loads(reference.to_str())["model"]["merges"]]
    assert theirs == list(islice(learn_merges(count_words(SOURCE)), 900 - 256))
    assert json.loads(trained_files(theirs, [])["vocab.json"]) == reference.get_vocab()


@pytest.mark.peers
def test_trained_folder_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="the package transformers (extra `peers`) is not installed"
    )
    assert run(tmp_path, "400") == 0
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reference(SOURCE + END).input_ids == load_huggingface_tokenizer(tmp_path / "out").encode(
        SOURCE + END
    )
    assert (reference.eos_token_id, len(reference)) == (399, 400)


def test_byte_tokenizer_needs_more_tokens_than_a_trained_one():
    assert len(train_bpe(SOURCE, 512).encode(SOURCE)) < 0.6 * len(ByteTokenizer().encode(SOURCE))
