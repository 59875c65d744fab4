"""`--out`: refused before the work where it would destroy something or cannot be written."""

import os

import pytest

from lama.cli.out import check_folder
from lama.errors import LamaError, UsageError


def check(out):
    check_folder(out, ("base.json", "other.json"), "a trained tokenizer")


def test_check_folder_takes_a_new_one_an_empty_one_and_its_own_and_changes_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "base.json").touch()
    (tmp_path / "own" / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    for name in ("empty", "own", "new", "new/below/it"):
        check(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_check_folder_says_what_is_in_the_way(tmp_path):
    (tmp_path / "b.txt").touch()
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match=r"new folder or one with a trained tokenizer in it; got .*, which holds other things: a, b\.txt$"):
        check(tmp_path)
    for name in ("c", "d", ".e"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"which holds other things: \.e, a, b\.txt and 2 more$"):
        check(tmp_path)


def test_check_folder_refuses_files_and_what_is_below_them(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"must be a folder; got the file .*file"):
        check(tmp_path / "file")
    with pytest.raises(LamaError, match=r"can be written; got .*below, as .*file cannot"):
        check(tmp_path / "file" / "below")
    with pytest.raises(LamaError, match=r"can be written; got .* \(File name too long\)"):
        check(tmp_path / ("a" * 300))


def test_check_folder_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(LamaError, match=f"can be written; got .*new, as {tmp_path} cannot"):
        check(tmp_path / "new" / "below" / "new")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
