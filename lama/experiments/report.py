"""What an experiment found: tables, curves and claims, as text, JSON and a picture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lama.figures import make_figure, render

COLUMNS = 2  # of panels in the picture


@dataclass(frozen=True)
class Options:
    """What an experiment may be told."""

    seed: int = 0
    steps: int | None = None
    """Of each training in it; None means the experiment's own number."""
    watch: Callable[[Iterable[Any], int, str], Iterable[Any]] = lambda steps, total, label: steps
    """Is handed what is iterated over, its length and its name, and may show how far it is."""


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
    logarithmic: bool = False
    """Both axes."""


@dataclass(frozen=True)
class Report:
    """All of it. `claims` are the answers in words, each with whether the numbers bear it out."""

    tables: Sequence[Table]
    panels: Sequence[Panel] = ()
    claims: dict[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        claims = "\n".join(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}" for claim, holds in self.claims.items())
        return "\n\n".join([*map(str, self.tables), *([claims] if claims else [])])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def picture(self) -> bytes:
        """A PNG with all panels. Raises LamaError where matplotlib is not installed."""
        rows, columns = -(-len(self.panels) // COLUMNS), min(COLUMNS, len(self.panels))
        figure = make_figure("curves", figsize=(6 * columns, 4 * rows), dpi=120, layout="constrained")
        for panel, axes in zip(self.panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
            for curve in panel.curves:
                axes.plot(curve.x, curve.y, label=curve.label, linewidth=1.3, marker="o" if len(curve.x) < 20 else None, markersize=4)
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            if panel.logarithmic:
                axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=8, frameon=False)
        for axes in figure.axes[len(self.panels) :]:
            axes.set_visible(False)
        return render(figure)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _fit(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The first column to the left, numbers to the right."""
    return [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
