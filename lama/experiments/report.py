"""Results of experiments: tables, curves, matrices and claims, as text, JSON, pictures and a web page."""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lama.figures import make_figure, render
from lama.tables import Table

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from lama.interp.pictures import HeatMap
    from lama.shapes import Array
    from lama.training.loop import Step

COLUMNS = 2  # panels side by side in the picture
INK = {"light": "#1b1f24", "dark": "#e6e6e6"}
META = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
img { max-width: 100%; height: auto; } .paper { background: #fff; border-radius: 4px; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8885; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
ul { list-style: none; padding: 0; } li { margin: .2rem 0; } .no { font-weight: bold; color: #d1332e; }
"""


class Stopped(Exception):
    """Raised by `Options.watch` between two steps if the user stops the experiment."""


@dataclass(frozen=True)
class Options:
    """Options of an experiment."""

    seed: int = 0
    steps: int | None = None
    """Steps of each training; by default the experiment's own number."""
    full: bool = False
    """The size of the paper, in experiments with two sizes."""
    folder: Path | None = None
    """The folder for the state of a resumable experiment, if it is to be saved."""
    watch: "Callable[[Iterable[Step], int, str], Iterable[Step]]" = lambda steps, total, label: steps
    """A function of a training's steps, their number and a label; it may show progress or raise Stopped."""
    say: Callable[[str], None] = lambda text: None
    """Called with measurements of a training other than its loss."""


@dataclass(frozen=True)
class Curve:
    """A line in a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def column_curve(label: str, rows: "Sequence[Sequence[float]] | Array", column: int) -> Curve:
    """A curve of one column of some rows over their first column."""
    return Curve(label, [row[0] for row in rows], [row[column] for row in rows])


@dataclass(frozen=True)
class Panel:
    """A diagram."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    logarithmic: str = ""
    """The logarithmic axes: x, y or xy."""
    bars: bool = False
    """Bars, side by side, instead of lines."""


@dataclass(frozen=True)
class Report:
    """A whole report. `claims` maps each answer in words to True if the numbers support it."""

    tables: Sequence[Table]
    panels: Sequence[Panel] = ()
    claims: dict[str, bool] = field(default_factory=dict)
    maps: "Sequence[HeatMap]" = ()

    def __str__(self) -> str:
        states = {True: "holds", False: "DOES NOT HOLD"}
        claims = "\n".join(f"{states[holds]}: {claim}" for claim, holds in self.claims.items())
        return "\n\n".join(filter(None, [*map(str, self.tables), claims]))

    def to_json(self, about: Mapping[str, object]) -> str:
        """The report without the maps as JSON, after the fields of `about`."""

        def plain(value: "range | np.float64") -> object:
            return list(value) if isinstance(value, range) else value.item()

        fields = {**about, **asdict(replace(self, maps=()))}
        return json.dumps(fields, indent=1, ensure_ascii=False, default=plain)

    def picture(self, kind: str = "png", ink: str = INK["light"]) -> bytes:
        """Draw all panels, as a png or svg, with axes and letters in the colour `ink`.

        Raises LamaError where matplotlib is not installed.
        """
        rows, columns = -(-len(self.panels) // COLUMNS), min(COLUMNS, len(self.panels))
        figure = make_figure("curves", figsize=(6 * columns, 4 * rows), dpi=120, layout="constrained")
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none", "text.color": ink}):
            matplotlib.rc("axes", labelcolor=ink, titlecolor=ink, edgecolor=ink)
            matplotlib.rc("xtick", color=ink)
            matplotlib.rc("ytick", color=ink)
            grid = figure.subplots(rows, columns, squeeze=False)
            for panel, axes in zip(self.panels, grid.flat, strict=False):
                _draw(panel, axes)
            for axes in figure.axes[len(self.panels) :]:
                axes.set_visible(False)
            return render(figure, kind, transparent=kind == "svg")

    @cached_property
    def maps_picture(self) -> bytes:
        """All heat maps as a png."""
        from lama.interp.pictures import heat_maps

        return heat_maps(self.maps)

    def to_html(self, title: str, about: str, drawn: bool = True) -> str:
        """The report as one self-contained page, with pictures if `drawn`. Raises LamaError as `picture`."""
        marks = {True: "✓", False: "<span class=no>✗</span>"}
        claims = "".join(f"<li>{marks[holds]} {escape(claim)}</li>" for claim, holds in self.claims.items())
        parts = [f"<ul>{claims}</ul>"] if claims else []
        if self.panels and drawn:
            light, dark = (_data("svg+xml", self.picture("svg", INK[theme])) for theme in ("light", "dark"))
            source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            parts.append(f'<picture>{source}<img src="{light}" alt="curves"></picture>')
        if self.maps and drawn:
            parts.append(f'<p><img class=paper src="{_data("png", self.maps_picture)}" alt="heat maps"></p>')
        parts += [table.to_html() for table in self.tables]
        body = f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n" + "\n".join(parts)
        head = f"{META}<title>{escape(title)}</title><style>{STYLE}</style>"
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _draw(panel: Panel, axes: "Axes") -> None:
    for i, curve in enumerate(panel.curves):
        if panel.bars:
            width = 0.8 / len(panel.curves)
            axes.bar([x + (i + 0.5) * width - 0.4 for x in curve.x], curve.y, width, label=curve.label)
        else:
            marker = "o" if len(curve.x) < 20 else None
            axes.plot(curve.x, curve.y, label=curve.label, linewidth=1.3, marker=marker, markersize=4)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.set(**{f"{axis}scale": "log" for axis in panel.logarithmic})
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
