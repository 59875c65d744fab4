"""Heat maps: what is drawn is what the values are, whatever the labels."""

import io
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from lama.errors import LamaError
from lama.interp.pictures import HeatMap, drawable, heat_maps

VALUES = np.arange(15.0).reshape(3, 5)
AWKWARD = ["$x_1$", "a\nb", "<b>&", "中", "\x00\x1b"]


@pytest.fixture(autouse=True)
def matplotlib():
    return pytest.importorskip("matplotlib", reason="the package matplotlib (extra `plots`) is not installed")


def pixels(png: bytes) -> np.ndarray:
    """(height, width, 3), from 0 to 1."""
    from matplotlib.image import imread

    return imread(io.BytesIO(png))[..., :3]


def middle(png: bytes, row: int, column: int) -> np.ndarray:
    """The colour in the middle of a cell of a 2 x 3 picture without labels or title; the bar takes the right
    of it.
    """
    image = pixels(png)
    framed = np.argwhere((image < 0.99).any(-1) & (np.arange(image.shape[1]) < image.shape[1] * 0.6))
    (top, left), (bottom, _) = framed.min(0), framed.max(0)
    side = (bottom - top) / 2
    return image[int(top + (row + 0.5) * side), int(left + (column + 0.5) * side)]


def test_heat_map_is_darker_where_values_are_higher_and_grey_where_there_are_none():
    png = heat_maps([HeatMap(np.array([[0, 1, 2], [3, np.nan, 5.0]]))])
    light = [middle(png, row, column).sum() for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2))]
    assert light == sorted(light, reverse=True) and light[0] > light[-1] + 1
    assert np.ptp(middle(png, 1, 1)) < 0.01


def test_centred_heat_map_is_blue_below_zero_white_there_and_red_above():
    png = heat_maps([HeatMap(np.array([[-1, 0, 0], [3.0, 0, 0]]), centred=True)])
    (r, _, b), zero, (r3, _, b3) = middle(png, 0, 0), middle(png, 0, 1), middle(png, 1, 0)
    assert b > r + 0.1 and r3 > b3 + 0.1 and zero.min() > 0.95
    assert r > 0.4  # paler: the same scale to both sides


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_heat_maps_are_the_same_bytes_each_time(kind):
    panels = [HeatMap(VALUES, f"head {i}", ["a", "b", "c"], AWKWARD, "looks at", "token") for i in range(3)]
    assert heat_maps(panels, kind) == heat_maps(panels, kind)


def test_svg_draws_labels_as_they_are(matplotlib):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = heat_maps(
            [HeatMap(VALUES, "$a^2$ and $", ["one", "two", "three"], AWKWARD, "x_$y$", "row")], "svg"
        )
    texts = [
        "".join(text.itertext())
        for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {
        "$x_1$",
        "a\\nb",
        "<b>&",
        "\ufffd",
        "\\x00\\x1b",
        "$a^2$ and $",
        "x_$y$",
        "one",
        "two",
        "three",
    } <= set(texts)


def test_labels_that_panels_share_are_written_once_a_row_and_once_a_column(matplotlib):
    panels = [
        HeatMap(VALUES, str(i), ["one", "two", "three"], ["v", "w", "x", "y", "z"], low=0, high=20)
        for i in range(7, 10)
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = heat_maps(panels, "svg", columns=2)
    texts = [
        "".join(text.itertext())
        for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    # Two rows, two columns, one bar.
    assert (texts.count("one"), texts.count("v"), texts.count("20")) == (2, 2, 1)
    assert [texts.count(str(i)) for i in (7, 8, 9)] == [1, 1, 1]


def test_labels_that_would_touch_are_thinned(matplotlib):
    labels = [f"t{i}" for i in range(293)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = heat_maps(
            [HeatMap(np.zeros((293, 7)), rows=labels), HeatMap(np.ones((293, 7)), rows=labels)], "svg"
        )
    shown = [label for label in labels if f">{label}<".encode() in svg]
    assert shown[:2] != labels[:2] and 40 < len(shown) < 200
    assert len(set(np.diff([int(label[1:]) for label in shown]))) == 1


def test_drawable_keeps_one_line_and_what_the_font_has():
    assert drawable("é·→$") == "é·→$"
    assert drawable("a\nb\t中") == "a\\nb\\t\ufffd"


@pytest.mark.parametrize(
    "values, options, message",
    [
        (np.zeros(3), {}, "a heat map must have rows and columns; got values of shape (3,)"),
        (np.zeros((3, 0)), {}, "a heat map must have rows and columns; got values of shape (3, 0)"),
        (VALUES, {"rows": ["a"]}, "rows must have no label or one for each of 3; got 1"),
        (VALUES, {"columns": ["a", "b"]}, "columns must have no label or one for each of 5; got 2"),
    ],
)
def test_heat_map_refuses_what_does_not_fit(values, options, message):
    with pytest.raises(ValueError) as error:
        HeatMap(values, **options)
    assert str(error.value) == message


def test_heat_maps_refuse_no_panel_and_an_unknown_kind():
    with pytest.raises(ValueError, match=r"^heat_maps must be given at least one panel; got none$"):
        heat_maps([])
    with pytest.raises(ValueError, match=r"^kind must be one of png, svg; got 'gif'$"):
        heat_maps([HeatMap(VALUES)], "gif")


def test_heat_maps_without_matplotlib_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        LamaError,
        match=r"^matplotlib, which draws a heat map, is not installed\. Run: pip install matplotlib$",
    ):
        heat_maps([HeatMap(VALUES)])
