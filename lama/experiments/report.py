"""What an experiment found: tables, curves, matrices and claims, as text, JSON, pictures and a page."""

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.figures import make_figure, render

if TYPE_CHECKING:
    from lama.interp.pictures import HeatMap

COLUMNS = 2  # of panels in the picture
INK = {"light": "#1b1f24", "dark": "#e6e6e6"}
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; } .paper { background: #fff; border-radius: 4px; }
div { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8885; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
ul { list-style: none; padding: 0; } li { margin: .2rem 0; } .no { font-weight: bold; color: #d1332e; }
"""


class Stopped(Exception):
    """Raised by `Options.watch` between two steps when the person at the keyboard wants no more of them."""


@dataclass(frozen=True)
class Options:
    """What an experiment may be told."""

    seed: int = 0
    steps: int | None = None
    """Of each training in it; None means the experiment's own number."""
    full: bool = False
    """At the size of its paper, for the experiments that have two."""
    folder: Path | None = None
    """There, an experiment that can go on later keeps how far it is; None: nowhere."""
    watch: Callable[[Iterable[Any], int, str], Iterable[Any]] = lambda steps, total, label: steps
    """Is handed the steps of a training, their number and a name, and may show how far it is. May raise Stopped."""
    say: Callable[[str], None] = lambda text: None
    """Is told what is seen of a training beside its loss."""


@dataclass(frozen=True)
class Table:
    """Rows under a heading; cells are text or numbers, which are shown with four significant digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __str__(self) -> str:
        cells = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [" | ".join(_fit(row, widths)).rstrip() for row in cells]
        return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])

    def to_html(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = ("".join(f"<td>{escape(_cell(value))}</td>" for value in row) for row in self.rows)
        return f"<div><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"


@dataclass(frozen=True)
class Curve:
    """A line in a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """A diagram."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    logarithmic: str = ""
    """The axes that are: x, y or xy."""
    bars: bool = False
    """Bars, side by side, for lines."""


@dataclass(frozen=True)
class Report:
    """All of it. `claims` are the answers in words, each with whether the numbers bear it out."""

    tables: Sequence[Table]
    panels: Sequence[Panel] = ()
    claims: dict[str, bool] = field(default_factory=dict)
    maps: "Sequence[HeatMap]" = ()

    def __str__(self) -> str:
        claims = "\n".join(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}" for claim, holds in self.claims.items())
        return "\n\n".join([*map(str, self.tables), *([claims] if claims else [])])

    def to_json(self, **about: Any) -> str:
        """All of it but the maps, after what is said `about` it."""

        def plain(value: Any) -> Any:
            return list(value) if isinstance(value, range) else value.item()  # else numpy's

        return json.dumps({**about, **asdict(replace(self, maps=()))}, indent=1, ensure_ascii=False, default=plain)

    def picture(self, kind: str = "png", ink: str = INK["light"]) -> bytes:
        """All panels, as a png or svg; axes and letters have the colour `ink`. Raises LamaError where matplotlib is not installed."""
        rows, columns = -(-len(self.panels) // COLUMNS), min(COLUMNS, len(self.panels))
        figure = make_figure("curves", figsize=(6 * columns, 4 * rows), dpi=120, layout="constrained")
        import matplotlib

        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
        style: dict[Any, Any] = {**dict.fromkeys(inked, ink), "svg.fonttype": "none"}
        with matplotlib.rc_context(style):
            for panel, axes in zip(self.panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
                _draw(panel, axes)
            for axes in figure.axes[len(self.panels) :]:
                axes.set_visible(False)
            return render(figure, kind, transparent=kind == "svg")

    def to_html(self, title: str, about: str, drawn: bool = True) -> str:
        """One page with all of it, which needs no other file; without pictures if not `drawn`. Raises LamaError as `picture` does."""
        from lama.interp.pictures import heat_maps

        claims = "".join(f"<li>{'✓' if holds else '<span class=no>✗</span>'} {escape(claim)}</li>" for claim, holds in self.claims.items())
        parts = [f"<ul>{claims}</ul>"] if claims else []
        if self.panels and drawn:
            light, dark = (_data("svg+xml", self.picture("svg", INK[theme])) for theme in ("light", "dark"))
            parts.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" alt="curves"></picture>'
            )
        if self.maps and drawn:
            parts.append(f'<p><img class=paper src="{_data("png", heat_maps(self.maps))}" alt="heat maps"></p>')
        parts += [table.to_html() for table in self.tables]
        body = f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n" + "\n".join(parts)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n'


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _draw(panel: Panel, axes: Any) -> None:
    for i, curve in enumerate(panel.curves):
        if panel.bars:
            width = 0.8 / len(panel.curves)
            axes.bar([x + (i + 0.5) * width - 0.4 for x in curve.x], curve.y, width, label=curve.label)
        else:
            axes.plot(curve.x, curve.y, label=curve.label, linewidth=1.3, marker="o" if len(curve.x) < 20 else None, markersize=4)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.set(**{f"{axis}scale": "log" for axis in panel.logarithmic})
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _fit(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The first column to the left, numbers to the right."""
    return [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
