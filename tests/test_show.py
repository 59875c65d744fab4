"""Views for notebooks: what they say as text, that they escape it, and how they look in a browser."""

import html
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, needs_chromium

import lama
from lama.errors import LamaError
from lama.interp import show
from lama.tables import Table

GENESIS = "In the beginning God created the heaven"
NAMES = "And Moses spake unto the LORD"


@pytest.fixture(scope="module")
def loaded():
    return lama.load("lama-bpe")


class Tags(HTMLParser):
    """Counts open tags; void ones have no end."""

    def __init__(self, text: str):
        super().__init__()
        self.depth, self.scripts = 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.depth += tag not in ("polyline", "rect")
        self.scripts += tag == "script"

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        self.depth -= tag not in ("polyline", "rect")


def test_matrix_has_its_numbers_labels_and_colours():
    view = show.matrix(np.array([[0.5, -1.0], [0.0, np.nan]]), ["a", "b"], ["x", "<y>"], "title")
    assert repr(view).splitlines()[0] == "title" and "-1.00" in repr(view)
    assert "&lt;y&gt;" in view.html and "<y>" not in view.html
    assert f"rgba({show.PLUS}, 0.38)" in view.html and f"rgba({show.MINUS}, 0.75)" in view.html
    assert Tags(view.html).depth == 0


def test_curves_leave_out_what_cannot_be_drawn():
    view = show.curves({"<a>": [(0, 1.0), (1, math.nan), (2, 0.0), (3, 0.5)]}, log=True)
    (points,) = re.findall(r'points="([^"]+)"', view.html)
    assert len(points.split()) == 2 and "&lt;a&gt;" in view.html
    assert "no numbers yet" in show.curves({"loss": []}, "t").html
    assert "nan" not in show.curves({"one": [(1, 1.0)]}).html


def test_views_of_a_model_say_what_the_functions_find(loaded):
    assert "·Moses" in repr(show.lens(*loaded, NAMES))
    assert "nats" in show.surprise(*loaded, GENESIS).html
    assert repr(show.pattern(*loaded, GENESIS, 3, 4)).startswith("head 3.4")
    page = show.attention(*loaded, GENESIS, layer=3)
    (inner,) = re.findall(r'srcdoc="([^"]*)"', page.html)
    assert html.unescape(inner).startswith("<!doctype html>".upper()) or "<html" in html.unescape(inner)
    assert 'sandbox="allow-scripts"' in page.html and Tags(page.html).scripts == 0
    for wrong in (lambda: show.surprise(*loaded, ""), lambda: show.pattern(*loaded, GENESIS, 9, 0)):
        with pytest.raises(LamaError):
            wrong()


def test_tables_are_drawn_by_notebooks():
    table = Table(["a"], [["<b>"]])
    assert table._repr_html_() == table.to_html() and "&lt;b&gt;" in table._repr_html_()


def test_live_passes_on_what_it_is_given(monkeypatch):
    reports = [type("R", (), {"step": i, "loss": 1.0 / i})() for i in range(1, 4)]
    assert [*show.live(iter(reports))] == reports
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert [*show.live(iter(reports))] == reports


@needs_chromium
def test_views_are_drawn_in_light_and_dark(loaded, tmp_path: Path):
    views = [
        show.attention(*loaded, GENESIS, layer=3),
        show.lens(*loaded, NAMES),
        show.surprise(*loaded, GENESIS),
        show.curves({"loss": [(i, 5 / (1 + i)) for i in range(20)]}, "loss"),
    ]
    body = "".join(f"<section>{view._repr_html_()}</section>" for view in views)
    style = (
        "<style>:root { color-scheme: light dark; } body { background: Canvas; color: CanvasText }</style>"
    )
    ready = '<script>document.documentElement.dataset.ready = "yes"</script>'
    page = tmp_path / "notebook.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{style}{body}{ready}", "utf-8")
    with Browser() as browser:
        shots = []
        for dark in (False, True):
            browser.open(page, width=900, height=1300, dark=dark)
            browser.run("await new Promise((done) => setTimeout(done, 500))")
            assert browser.run("return document.querySelectorAll('section svg polyline').length") == 1
            assert browser.run("return document.querySelector('table').offsetHeight") > 60
            assert browser.run("return document.documentElement.scrollWidth") <= 900
            assert browser.complaints == []
            browser.screenshot(tmp_path / f"{dark}.png")
            shots.append((tmp_path / f"{dark}.png").read_bytes())
        assert len(set(shots)) == 2 and all(len(shot) > 20_000 for shot in shots)
