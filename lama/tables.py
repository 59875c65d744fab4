"""Tables as text and HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Rows under a heading. Cells are text or numbers, which are shown with four significant digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __str__(self) -> str:
        cells = [list(self.columns), *([format_cell(value) for value in row] for row in self.rows)]
        first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
        padded = ([row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in cells)
        lines = [" | ".join(row).rstrip() for row in padded]
        return "\n".join([lines[0], "-+-".join("-" * width for width in (first, *widths)), *lines[1:]])

    def to_html(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = ("".join(f"<td>{escape(format_cell(value))}</td>" for value in row) for row in self.rows)
        return f"<div><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"

    _repr_html_ = to_html  # what a notebook shows


def format_cell(value: object) -> str:
    """Text as it is, 12,345 for an integer, 1.234 for another number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


NAMES, CELLS = 22, 10  # least widths


def metric_table(heading: str, columns: Iterable[str], *rows: tuple[str, Iterable[object], str]) -> str:
    """Columns side by side under a heading. Each row is its name, a value for each column, and their format.

    Names are aligned left, cells right; all columns have the width of the widest cell.
    """
    lines = [(name, [format(value, spec) for value in values]) for name, values, spec in rows]
    lines = [(heading, list(columns)), *lines]
    first = max(NAMES, *(len(name) + 2 for name, _ in lines))
    width = max(CELLS, *(len(cell) for _, cells in lines for cell in cells))
    aligned = (" | ".join(cell.rjust(width) for cell in cells) for _, cells in lines)
    return "\n".join(f"{name:<{first}}| {cells}" for (name, _), cells in zip(lines, aligned, strict=True))
