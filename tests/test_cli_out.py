"""`--out`: refused before the work where it would destroy something or cannot be written."""

import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lama.cli.out import Occupied, check_file, check_folder, free_folder, signed, write_file
from lama.errors import LamaError, UsageError
from lama.interp.pictures import HeatMap, heat_maps
from lama.marker import claimed, made_by

check = partial(check_folder, command="bert")


def state(folder: Path) -> dict[str, object]:
    """All below it: links as links, files with their bytes."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def made(folder: Path, command: str) -> Path:
    """A folder with a file in it, made by a command."""
    with claimed(folder, command):
        (folder / "config.json").write_text("{}")
    return folder


def test_check_folder_takes_a_new_one_an_empty_one_and_its_own_and_changes_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to("empty")
    (tmp_path / "to-nothing").symlink_to("nothing")
    made(tmp_path / "own", "bert")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "lama.json").write_text('{"made_by": "train"}')  # at the very beginning
    (tmp_path / "killed" / ".lama-0123456789ab").mkdir()
    before = state(tmp_path)
    for name in ("empty", "new", "new/below/it", "to-empty", "to-nothing", "killed"):
        check(tmp_path / name)
    check(tmp_path / "own", replace=True)
    assert state(tmp_path) == before


def test_check_folder_says_what_is_in_the_way(tmp_path):
    (tmp_path / "b.txt").touch()
    (tmp_path / "a").mkdir()
    with pytest.raises(
        UsageError,
        match=r"must be a new or empty folder; got .*, which has other files: a, b\.txt$",
    ):
        check(tmp_path)
    for name in ("c", "d", ".e"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"which has other files: \.e, a, b\.txt and 2 more$"):
        check(tmp_path, replace=True)


@pytest.mark.parametrize(
    "marker", ["", "{", "[]", '{"made_by": 5}', '{"made_by": "train"}', '{"made_by": "bert "}', "[" * 100_000]
)
def test_check_folder_believes_no_other_marker(tmp_path, marker):
    (tmp_path / "config.json").touch()
    (tmp_path / "lama.json").write_text(marker)
    with pytest.raises(Occupied, match=r"which has (other files|output of lama (train|bert )): config\.json"):
        check(tmp_path, replace=True)


def test_check_folder_replaces_its_own_only_when_asked_to(tmp_path):
    own, other = made(tmp_path / "own", "bert"), made(tmp_path / "other", "experiment words")
    with pytest.raises(
        Occupied,
        match=rf"^--out has earlier output of lama bert, {own}\. Replace it with --restart, "
        "or choose another",
    ):
        check(own, replace=False)
    with pytest.raises(Occupied, match=r"^--out must be a new or empty folder; got .*own$"):
        check(own)
    with pytest.raises(Occupied, match=r"which has output of lama experiment words: config\.json$"):
        check(other, replace=True)
    (other / "lama.json").unlink()  # an earlier version had no marker
    check(other, replace=True, older=True)
    with pytest.raises(Occupied, match="earlier output of lama bert"):
        check(other, replace=False, older=True)


@pytest.mark.parametrize("inner", ["data/mine", "checkpoints/step-000003/int8", "unfinished/x"])
def test_check_folder_refuses_the_inside_of_a_run(tmp_path, inner):
    run = made(tmp_path / "run", "train")
    with pytest.raises(
        UsageError,
        match=r"must be outside a run's own folders; got .*, in .*run/(data|checkpoints|unfinished)$",
    ):
        check(run / inner)
    check(run / "beside")


def test_check_folder_refuses_files_and_what_is_below_them(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "link", "loop"):
        with pytest.raises(UsageError, match=rf"must be a folder; got the file .*{name}"):
            check(tmp_path / name)
    with pytest.raises(LamaError, match=r"can be written; got .*below, as .*file cannot"):
        check(tmp_path / "file" / "below")
    with pytest.raises(LamaError, match=r"can be written; got .* \(File name too long\)"):
        check(tmp_path / ("a" * 300))
    with pytest.raises(LamaError, match=r"can be written; got .{180,260} \(File name too long\)$"):
        check(tmp_path / ("a" * 300) / ("b" * 5000))


def test_check_folder_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(LamaError, match=f"can be written; got .*new, as {tmp_path} cannot"):
        check(tmp_path / "new" / "below" / "new")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_check_folder_in_a_folder_that_was_removed_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(
        LamaError, match=r"must be a folder that can be written; got out/bert \(No such file or directory\)$"
    ):
        check(Path("out/bert"))
    check(tmp_path / "out")


def test_default_folder_is_the_first_that_is_free_and_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    default = Path("out/bert")
    assert free_folder(None, default, check) == default and capsys.readouterr().err == ""
    made(tmp_path / default, "bert")
    (tmp_path / "out" / "bert-2").mkdir()
    (tmp_path / "out" / "bert-2" / "photo.png").touch()
    assert free_folder(None, default, check) == Path("out/bert-3")
    assert capsys.readouterr().err == "lama: out/bert is not changed: writing to out/bert-3\n"
    assert free_folder(None, default, partial(check, replace=True)) == default
    with pytest.raises(Occupied):
        free_folder(default, Path("other"), check)


# --- the marker and the lock


def test_claimed_folder_is_marked_and_is_gone_if_nothing_came(tmp_path):
    folder = tmp_path / "a" / "b"
    with claimed(folder, "tokenizer"):
        assert json.loads((folder / "lama.json").read_bytes()) == {"made_by": "tokenizer", "version": "0.1.0"}
    assert not (tmp_path / "a").exists()
    with pytest.raises(ZeroDivisionError), claimed(folder, "tokenizer"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    with claimed(tmp_path / "empty", "bert"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []
    assert made_by(made(folder, "tokenizer")) == "tokenizer"
    with pytest.raises(ZeroDivisionError), claimed(folder, "tokenizer"):
        raise ZeroDivisionError
    assert made_by(folder) == "tokenizer"


def test_claim_leaves_what_others_made_as_it_was(tmp_path):
    for marker in (None, "{}", '{"made_by": "train"}'):
        folder = tmp_path / f"{marker}"[:4].strip('{":')
        folder.mkdir()
        (folder / "photo.png").touch()
        (folder / ".saving-99999").mkdir()
        if marker is not None:
            (folder / "lama.json").write_text(marker)
        before = state(folder)
        with claimed(folder, "bert"):
            pass
        if made_by(folder):  # lama's own: what a killed process left is removed
            before.pop(".saving-99999")
        assert state(folder) == before


def test_claim_follows_links_and_never_a_marker_that_is_one(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to("new/below")
    made(tmp_path / "link", "bert")
    assert made_by(tmp_path / "new" / "below") == "bert" and (tmp_path / "link").is_symlink()
    (tmp_path / "new" / "below" / "lama.json").unlink()
    (tmp_path / "new" / "below" / "lama.json").symlink_to(tmp_path / "mine.txt")
    with (
        pytest.raises(LamaError, match=r"the folder .* cannot be written"),
        claimed(tmp_path / "link", "bert"),
    ):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_filesystem_without_locks_costs_a_note(tmp_path, monkeypatch, capsys):
    def flock(file: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    made(tmp_path / "a", "bert")
    assert re.fullmatch(
        r"lama: .*a cannot be locked \(.*Operation not supported\): let no other .*\n",
        capsys.readouterr().err,
    )


# --- single files


def picture(command: str, kind: str) -> bytes:
    content = (
        b"<!doctype html>\n<meta charset='utf-8'>"
        if kind == "html"
        else heat_maps([HeatMap(np.eye(2))], kind)
    )
    return signed(content, kind, command)


@pytest.mark.parametrize("kind", ["html", "png", "svg"])
def test_file_of_the_same_command_is_replaced_and_no_other(tmp_path, kind):
    out = tmp_path / f"picture.{kind}"
    check_file(out, [kind], "heads")
    write_file(
        out,
        heat_maps([HeatMap(np.eye(2))], kind) if kind != "html" else b"<meta charset='utf-8'>",
        "a map",
        "heads",
    )
    first = out.read_bytes()
    check_file(out, [kind], "heads")
    with pytest.raises(
        UsageError,
        match=rf"must be a new file, or one that lama lens wrote; got .*\.{kind}\. Choose another name",
    ):
        check_file(out, [kind], "lens")
    with pytest.raises(UsageError, match="must be a new file"):
        write_file(out, picture("lens", kind), "a map", "lens")
    assert out.read_bytes() == first
    for foreign in (b"", b"a photo", first.replace(b"lama heads", b"lama leads"), b" " * 2000 + first):
        out.write_bytes(foreign)
        with pytest.raises(UsageError, match="must be a new file"):
            check_file(out, [kind], "heads")


def test_signed_picture_is_a_picture_and_the_same_each_time(tmp_path):
    from matplotlib import image

    assert picture("heads", "png") == picture("heads", "png")
    (tmp_path / "a.png").write_bytes(picture("heads", "png"))
    assert image.imread(tmp_path / "a.png").ndim == 3
    assert picture("heads", "svg").startswith(b"<?xml") and b"<!-- lama heads -->\n<svg " in picture(
        "heads", "svg"
    )


def test_file_behind_a_link_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "page.html").symlink_to("there/real.html")
    for _ in range(2):  # at first it leads nowhere
        write_file(tmp_path / "page.html", b"<meta charset='utf-8'>", "a page", "attention")
        assert (tmp_path / "page.html").is_symlink() and b"lama attention" in (
            tmp_path / "there" / "real.html"
        ).read_bytes()
    (tmp_path / "photo.html").symlink_to(tmp_path / "there" / "photo.html")
    (tmp_path / "there" / "photo.html").write_text("mine")
    (tmp_path / "nowhere.html").symlink_to(tmp_path / "no" / "folder.html")
    (tmp_path / "loop.html").symlink_to("loop.html")
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "device.html").symlink_to("/dev/null")
    for name in ("photo", "nowhere", "loop", "pipe", "device"):
        with pytest.raises(LamaError, match=r"must be a new file|must be in an existing folder"):
            check_file(tmp_path / f"{name}.html", ["html"], "attention")


def test_file_with_a_name_of_255_bytes_is_written(tmp_path):
    write_file(tmp_path / ("a" * 250 + ".html"), b"<meta charset='utf-8'>", "a page", "attention")
    with pytest.raises(LamaError, match=r"can be written; got .* \(File name too long\)"):
        check_file(tmp_path / ("a" * 251 + ".html"), ["html"], "attention")


def test_picture_without_matplotlib_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    check_file(tmp_path / "a.html", ["html"], "attention")
    with pytest.raises(
        LamaError,
        match=r"matplotlib, which draws a picture, is not installed\. Run: pip install matplotlib$",
    ):
        check_file(tmp_path / "a.png", ["png"], "heads")
