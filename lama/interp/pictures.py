"""Draw matrices as heat maps, alone or in a grid. The result is the bytes of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lama.errors import printable
from lama.figures import make_figure, render
from lama.shapes import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

FONT = "DejaVu Sans"  # comes with matplotlib
SEQUENTIAL, DIVERGING, MISSING = "Blues", "RdBu_r", "#dddddd"
LARGEST, LETTER = 8.0, 0.57  # font size in points; a letter's width as a share of its height
LEAST_POINTS = 3.5  # smaller labels are unreadable: some are left out instead
# Inches for a panel's title, an axis's name, the gap between panels, and a colour bar.
TITLE, NAME, GAP, BAR = 0.24, 0.22, 0.14, 0.72


@dataclass(frozen=True)
class HeatMap:
    """A matrix to draw: darker cells have higher values, NaN is grey."""

    values: Array
    """(R, C)."""
    title: str = ""
    rows: Sequence[str] = ()
    """R labels from the top, or none."""
    columns: Sequence[str] = ()
    """C labels from the left, or none."""
    x: str = ""
    """The columns' name."""
    y: str = ""
    """The rows' name."""
    centred: bool = False
    """Blue below 0, red above: for differences."""
    low: float | None = None
    """The value of the lightest colour; by default the smallest."""
    high: float | None = None
    """The value of the darkest colour; by default the largest."""
    unit: str = ""
    """The unit, shown next to the colour bar."""

    def __post_init__(self) -> None:
        shape = np.shape(self.values)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"a heat map must have rows and columns; got values of shape {shape}")
        for name, labels, n in (("rows", self.rows, shape[0]), ("columns", self.columns, shape[1])):
            if len(labels) not in (0, n):
                raise ValueError(f"{name} must have no label or one for each of {n}; got {len(labels)}")

    def limits(self) -> tuple[float, float]:
        """The values of the lightest and the darkest colour."""
        finite = self.values[np.isfinite(self.values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if self.centred:
            low, high = -max(-low, high, 0.0), max(-low, high, 0.0)
        low, high = low if self.low is None else self.low, high if self.high is None else self.high
        return (low, high) if low < high else (low, low + 1)


def heat_maps(panels: Sequence[HeatMap], kind: str = "png", columns: int | None = None) -> bytes:
    """Draw panels in a grid, `columns` wide (default: about square), as a png or svg.

    Labels that all panels share are written once, at the left and at the bottom. Panels with the same scale
    share a colour bar. Raises LamaError without matplotlib, ValueError without panels.
    """
    if not panels:
        raise ValueError("heat_maps must be given at least one panel; got none")
    figure = make_figure("a heat map")
    import matplotlib

    with matplotlib.rc_context({"font.family": FONT, "text.parse_math": False}):  # a token may be "$"
        _draw(figure, panels, columns)
        return render(figure, kind, dpi=150, bbox_inches="tight", pad_inches=0.06)


def _draw(figure: "Figure", panels: Sequence[HeatMap], columns: int | None) -> None:
    from matplotlib.cm import ScalarMappable

    many = len(panels)
    columns = min(many, columns or _side(many))
    rows = -(-many // columns)
    width, height = np.max([_size(panel, many) for panel in panels], axis=0)
    shared = [len({tuple(getattr(panel, axis)) for panel in panels}) == 1 for axis in ("rows", "columns")]
    one_bar = len({(panel.limits(), panel.centred) for panel in panels}) == 1
    font = min(_font(panel, width, height) for panel in panels)
    # Shared labels need space once, others in each column and row of panels.
    beside = [_label_width(panel.rows, font, panel.y) for panel in panels]
    under = [_label_width(panel.columns, font, panel.x) for panel in panels]
    lefts = [max(beside[i::columns]) if not shared[0] or i == 0 else 0.0 for i in range(columns)]
    lowest = [max(under[i : i + columns]) for i in range(0, many, columns)]
    belows = [below if not shared[1] or i == rows - 1 else 0.0 for i, below in enumerate(lowest)]
    above = TITLE if any(panel.title for panel in panels) else 0.0
    bar_each, bar_once = (0.0, BAR) if one_bar else (BAR, 0.0)
    x_of = np.cumsum([0.0, *(left + width + GAP + bar_each for left in lefts)])
    y_of = np.cumsum([0.0, *(above + height + GAP + below for below in belows)])
    total_width, total_height = float(x_of[-1]) + bar_once, float(y_of[-1])
    figure.set_size_inches(total_width, total_height)
    room = float(np.diff(x_of).min()) * 72 / LETTER / max(1, max(len(panel.title) for panel in panels))
    largest = 9.0 if any(panel.rows or panel.columns for panel in panels) else 7.0
    points = max(LEAST_POINTS, min(largest, room))
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        x, top = x_of[column] + lefts[column], y_of[row] + above
        bottom, tall = 1 - (top + height) / total_height, height / total_height
        axes = figure.add_axes((x / total_width, bottom, width / total_width, tall))
        _draw_matrix(axes, panel, points)
        if not shared[0] or column == 0:
            _label(axes.yaxis, panel.rows, panel.y, height, font)
        if not shared[1] or i + columns >= many:
            _label(axes.xaxis, panel.columns, panel.x, width, font)
        if not one_bar or (row == 0 and column == columns - 1):
            left = (x + width + GAP / 2) / total_width
            bar = figure.add_axes((left, bottom, 0.1 / total_width, tall))
            figure.colorbar(ScalarMappable(axes.images[0].norm, axes.images[0].cmap), cax=bar)
            bar.set_ylabel(drawable(panel.unit), fontsize=7)
            bar.tick_params(labelsize=7, length=2, width=0.5)
            bar.spines[:].set_visible(False)


def _side(n: int) -> int:
    """Columns of a nearly square grid of n panels, with full rows if possible."""
    root = int(np.ceil(np.sqrt(n)))
    full = (columns for columns in range(root, 2 * root) if n % columns == 0 and columns * columns < 3 * n)
    return next(full, root)


def _draw_matrix(axes: "Axes", panel: HeatMap, points: float) -> None:
    import matplotlib

    colours = matplotlib.colormaps[DIVERGING if panel.centred else SEQUENTIAL].with_extremes(bad=MISSING)
    low, high = panel.limits()
    axes.imshow(panel.values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.set_title(drawable(panel.title), fontsize=points, pad=3)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="#999999", linewidth=0.5)


def _label(axis: "Axis", labels: Sequence[str], name: str, inches: float, font: float) -> None:
    """Write the labels, upright along x if they are long, and the name of an axis of that length."""
    from matplotlib.axis import XAxis

    every = max(1, int(np.ceil(len(labels) * font / 72 / inches)))  # labels that would overlap are left out
    places = range(0, len(labels), every)
    axis.set_ticks([*places], [drawable(labels[i]) for i in places])
    axis.set_tick_params(length=0, pad=2, labelsize=font)
    if isinstance(axis, XAxis) and any(len(label) > 2 for label in labels):
        axis.set_tick_params(rotation=90)
    axis.set_label_text(drawable(name), fontsize=8)


def _size(panel: HeatMap, many: int) -> tuple[float, float]:
    """Width and height of a panel's matrix in inches."""
    cell, least, most = (0.13, 1.3, 3.6) if many <= 16 else (0.08, 0.6, 1.0)
    if many == 1:
        cell, least, most = 0.24, 1.6, 10.0
    rows, columns = panel.values.shape
    cell = min(cell, most / max(rows, columns))
    cell = max(cell, min(least / max(rows, columns), 0.5))
    return max(columns * cell, 0.3), max(rows * cell, 0.3)


def _font(panel: HeatMap, width: float, height: float) -> float:
    """The font size in points at which a panel's labels do not touch."""
    rows, columns = panel.values.shape
    size = LARGEST
    if panel.rows:
        size = min(size, height / rows * 72 * 0.9)
    if panel.columns:
        size = min(size, width / columns * 72 * 0.9)
    return max(LEAST_POINTS, size)


def _label_width(labels: Sequence[str], font: float, name: str) -> float:
    longest = max(map(len, labels), default=0)
    width = longest * font * LETTER / 72 + 0.06 if longest else 0.0
    return width + NAME if name else width


def drawable(label: str) -> str:
    """The label on one line: a line break becomes `\\n`, a character that the font lacks U+FFFD."""
    return "".join(c if _font_file().get_char_index(ord(c)) else "\ufffd" for c in printable(label))


@cache
def _font_file() -> "FT2Font":
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont(FONT))
