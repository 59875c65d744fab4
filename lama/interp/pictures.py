"""Matrices as pictures: one heat map, or many beside each other. Bytes, for any output."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lama.figures import make_figure, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FONT = "DejaVu Sans"  # comes with matplotlib
SEQUENTIAL, DIVERGING, MISSING = "Blues", "RdBu_r", "#dddddd"
LARGEST, LETTER = 8.0, 0.57  # points; a letter's width in its height, about
LEAST_POINTS = 3.5  # smaller labels cannot be read: only some of them are written
TITLE, NAME, GAP, BAR = 0.24, 0.22, 0.14, 0.72  # inches: above a panel, beside an axis, between panels, of a colour bar


@dataclass(frozen=True)
class HeatMap:
    """A matrix to be drawn, darker where its values are higher; NaN is grey."""

    values: np.ndarray
    """(R, C)."""
    title: str = ""
    rows: Sequence[str] = ()
    """Labels, from the top; none, or R."""
    columns: Sequence[str] = ()
    """Labels, from the left; none, or C."""
    x: str = ""
    """What the columns are."""
    y: str = ""
    """What the rows are."""
    centred: bool = False
    """Blue below 0, white there, red above: for differences."""
    low: float | None = None
    """The value of the lightest colour; the smallest one where it is not given."""
    high: float | None = None
    """The value of the darkest colour; the largest one where it is not given."""
    unit: str = ""
    """What the values are: stands beside the colour bar."""

    def __post_init__(self) -> None:
        shape = np.shape(self.values)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"a heat map must have rows and columns; got values of shape {shape}")
        for name, labels, n in (("rows", self.rows, shape[0]), ("columns", self.columns, shape[1])):
            if len(labels) not in (0, n):
                raise ValueError(f"{name} must have no label or one for each of {n}; got {len(labels)}")

    def limits(self) -> tuple[float, float]:
        """The values of the two ends of the colours: those given, else such that all values fit."""
        finite = self.values[np.isfinite(self.values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if self.centred:
            low, high = -max(-low, high, 0.0), max(-low, high, 0.0)
        low, high = low if self.low is None else self.low, high if self.high is None else self.high
        return (low, high) if low < high else (low, low + 1)


def heat_maps(panels: Sequence[HeatMap], kind: str = "png", columns: int | None = None) -> bytes:
    """One picture of all panels, `columns` of them beside each other (as a square, if not said), as a png or svg.

    Labels that all panels share stand at the left and at the bottom only, and one colour bar is there where all have one scale.
    Raises LamaError where matplotlib is not installed, ValueError without panels.
    """
    if not panels:
        raise ValueError("heat_maps must be given at least one panel; got none")
    figure = make_figure("a heat map")
    import matplotlib

    with matplotlib.rc_context({"font.family": FONT, "text.parse_math": False}):  # a token may well be "$"
        _draw(figure, panels, columns)
        return render(figure, kind, dpi=150, bbox_inches="tight", pad_inches=0.06)


def _draw(figure: "Figure", panels: Sequence[HeatMap], columns: int | None) -> None:
    from matplotlib.cm import ScalarMappable

    many = len(panels)
    columns = min(many, columns or _side(many))
    rows = -(-many // columns)
    width, height = np.max([_size(panel, many) for panel in panels], axis=0)
    shared = _shared(panels, "rows"), _shared(panels, "columns")
    one_bar = len({(panel.limits(), panel.centred) for panel in panels}) == 1
    font = min(_font(panel, width, height) for panel in panels)
    # Labels that are shared take room once; others beside each column of panels as the widest there needs, and below each row.
    beside = [[_label_width(panel.rows, font) + NAME * bool(panel.y) for panel in panels[i::columns]] for i in range(columns)]
    under = [
        [_label_width(panel.columns, font) + NAME * bool(panel.x) for panel in panels[i * columns : (i + 1) * columns]] for i in range(rows)
    ]
    lefts = [max(room) if not shared[0] or i == 0 else 0.0 for i, room in enumerate(beside)]
    belows = [max(room) if not shared[1] or i == rows - 1 else 0.0 for i, room in enumerate(under)]
    above = TITLE * any(panel.title for panel in panels)
    x_of = np.cumsum([0.0, *(left + width + GAP + BAR * (not one_bar) for left in lefts)])
    y_of = np.cumsum([0.0, *(above + height + GAP + below for below in belows)])
    total = float(x_of[-1]) + BAR * one_bar, float(y_of[-1])
    figure.set_size_inches(*total)
    room = float(np.diff(x_of).min()) * 72 / LETTER / max(1, max(len(panel.title) for panel in panels))
    points = max(LEAST_POINTS, min(9.0 if any(panel.rows or panel.columns for panel in panels) else 7.0, room))
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        x, top = x_of[column] + lefts[column], y_of[row] + above
        axes = figure.add_axes((x / total[0], 1 - (top + height) / total[1], width / total[0], height / total[1]))
        _draw_matrix(axes, panel, points)
        if not shared[0] or column == 0:
            _label(axes.yaxis, panel.rows, panel.y, height, font)
        if not shared[1] or i + columns >= many:
            _label(axes.xaxis, panel.columns, panel.x, width, font, upright=any(len(label) > 2 for label in panel.columns))
        if not one_bar or (row == 0 and column == columns - 1):
            bar = figure.add_axes(((x + width + GAP / 2) / total[0], 1 - (top + height) / total[1], 0.1 / total[0], height / total[1]))
            figure.colorbar(ScalarMappable(axes.images[0].norm, axes.images[0].cmap), cax=bar)
            bar.set_ylabel(drawable(panel.unit), fontsize=7)
            bar.tick_params(labelsize=7, length=2, width=0.5)
            bar.spines[:].set_visible(False)


def _side(n: int) -> int:
    """How many of n panels stand beside each other: about as many as above each other, and such that no row is short, if possible."""
    root = int(np.ceil(np.sqrt(n)))
    return next((columns for columns in range(root, 2 * root) if n % columns == 0 and columns * columns < 3 * n), root)


def _draw_matrix(axes: "Axes", panel: HeatMap, points: float) -> None:
    """The matrix, and above it its title."""
    import matplotlib

    colours = matplotlib.colormaps[DIVERGING if panel.centred else SEQUENTIAL].with_extremes(bad=MISSING)
    low, high = panel.limits()
    axes.imshow(np.ma.masked_invalid(panel.values), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.set_title(drawable(panel.title), fontsize=points, pad=3)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="#999999", linewidth=0.5)


def _label(axis: "Axis", labels: Sequence[str], name: str, inches: float, font: float, upright: bool = False) -> None:
    """Write the labels beside an axis of that length, and its name."""
    places = _places(len(labels), inches, font)
    axis.set_ticks(places, [drawable(labels[i]) for i in places])
    axis.set_tick_params(length=0, pad=2, labelsize=font)
    if upright:
        axis.set_tick_params(rotation=90)
    axis.set_label_text(drawable(name), fontsize=8)


def _places(n: int, inches: float, font: float) -> list[int]:
    """Which of n labels are written: all, or every second, ... where they would lie upon each other."""
    return list(range(0, n, max(1, int(np.ceil(n * font / 72 / inches)))))


def _size(panel: HeatMap, many: int) -> tuple[float, float]:
    """Width and height of a panel's matrix in inches: more for more cells, less for more panels."""
    cell, least, most = (0.24, 1.6, 10.0) if many == 1 else (0.13, 1.3, 3.6) if many <= 16 else (0.08, 0.6, 1.0)
    rows, columns = panel.values.shape
    cell = min(cell, most / max(rows, columns))
    cell = max(cell, min(least / max(rows, columns), 0.5))
    return max(columns * cell, 0.3), max(rows * cell, 0.3)


def _font(panel: HeatMap, width: float, height: float) -> float:
    """Points in which a panel's labels do not touch."""
    rows, columns = panel.values.shape
    sizes = [LARGEST] + [height / rows * 72 * 0.9] * bool(panel.rows) + [width / columns * 72 * 0.9] * bool(panel.columns)
    return max(LEAST_POINTS, min(sizes))


def _label_width(labels: Sequence[str], font: float) -> float:
    """Inches that the longest label takes."""
    longest = max(map(len, labels), default=0)
    return longest * font * LETTER / 72 + 0.06 if longest else 0.0


def _shared(panels: Sequence[HeatMap], name: str) -> bool:
    return len({tuple(getattr(panel, name)) for panel in panels}) == 1


def drawable(label: str) -> str:
    """The label on one line, each character that the font lacks replaced: `a\\nb` for a line's end, U+FFFD for an emoji."""
    return "".join(c if _in_font(c) else "\ufffd" for c in "".join(c if c.isprintable() else repr(c)[1:-1] for c in label))


@cache
def _in_font(character: str) -> bool:
    return _font_file().get_char_index(ord(character)) != 0


@cache
def _font_file() -> Any:
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont(FONT))
