"""docs/gallery.md is what scripts/make_gallery.py writes: its pictures and printed tables are there, and its
commands are lama's.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from lama.cli import make_parser
from lama.errors import LamaError

ROOT = Path(__file__).parent.parent
GALLERY = runpy.run_path(str(ROOT / "scripts" / "make_gallery.py"), run_name="gallery")
PAGE, FOLDER = ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"


def test_gallery_shows_every_picture_and_no_other():
    shown = re.findall(r"\]\(gallery/([^)]+)\)", PAGE.read_text("utf-8"))
    shown += [file for entry in GALLERY["ENTRIES"] for file in entry.files if file.endswith(".txt")]
    assert sorted(shown) == sorted(path.name for path in FOLDER.iterdir()) and len(shown) > 8
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1.5e6


def test_gallery_is_what_the_script_writes():
    text = PAGE.read_text("utf-8")
    assert GALLERY["page_text"]() == text


@pytest.mark.parametrize("entry", GALLERY["ENTRIES"], ids=lambda entry: entry.name)
def test_gallery_commands_are_ones_that_lama_has(entry, capsys):
    for command in filter(None, (entry.before, entry.command)):
        program, *words = shlex.split(command)
        assert program == "lama"
        make_parser().parse_args(words)
        assert capsys.readouterr().err == ""  # no hint at an older form


def test_printed_tables_are_shown_as_they_are():
    text, tables = PAGE.read_text("utf-8"), sorted(FOLDER.glob("*.txt"))
    assert tables and all(f"```text\n{table.read_text('utf-8')}```\n" in text for table in tables)


def test_entries_of_a_model_that_is_not_here_are_skipped_in_one_line(monkeypatch, capsys):
    def fail(name: str) -> None:
        raise LamaError(f"model {name} must be here")

    def refuse(entry: object) -> None:
        raise AssertionError(entry)

    script = GALLERY["main"].__globals__
    before = PAGE.read_bytes()
    monkeypatch.setitem(script, "find", fail)
    monkeypatch.setitem(script, "make", refuse)
    assert GALLERY["main"](["induction-ablation"]) == 0
    assert capsys.readouterr().err == "induction-ablation is skipped: model smollm2 must be here\n"
    assert PAGE.read_bytes() == before


def test_script_refuses_an_entry_that_is_none(capsys):
    assert GALLERY["main"](["heads", "nothing"]) == 2
    assert "got nothing" in capsys.readouterr().err
