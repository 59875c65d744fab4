"""docs/gallery.md is what scripts/make_gallery.py writes: its pictures are there, and its commands are
lama's.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from lama.cli import make_parser

ROOT = Path(__file__).parent.parent
GALLERY = runpy.run_path(str(ROOT / "scripts" / "make_gallery.py"), run_name="gallery")
PAGE, FOLDER = ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"


def test_gallery_shows_every_picture_and_no_other():
    shown = re.findall(r"\]\(gallery/([^)]+)\)", PAGE.read_text("utf-8"))
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


def test_script_refuses_an_entry_that_is_none(capsys):
    assert GALLERY["main"](["heads", "nothing"]) == 2
    assert "got nothing" in capsys.readouterr().err
