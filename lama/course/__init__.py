"""The course: notebooks that explain how a transformer works, with a model that runs while you read.

A notebook is a Markdown file in jupytext's format next to this module: fenced blocks of `python` are cells of
code, all else is text. `lama course` writes them as notebooks and opens JupyterLab.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<text>.*?)\n?^```$\n?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook."""

    kind: str
    """markdown or code."""
    text: str
    tags: tuple[str, ...] = ()
    """Tags; the cell `parameters` sets the size of the whole notebook."""


def notebooks() -> list[Path]:
    """The notebooks' files in reading order."""
    return sorted(Path(__file__).parent.glob("[0-9]*.md"))


def title(path: Path) -> str:
    """The heading of a notebook."""
    found = re.search(r"^# (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else path.stem


def read_notebook(path: Path) -> list[Cell]:
    """The cells of a Markdown file, without jupytext's header."""
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text("utf-8"), flags=re.DOTALL)
    cells, end = [], 0
    for match in FENCE.finditer(text):
        if before := text[end : match.start()].strip():
            cells.append(Cell("markdown", before))
        tags = re.search(r"tags=(\[[^\]]*\])", match["options"])
        cells.append(Cell("code", match["text"], tuple(json.loads(tags[1])) if tags else ()))
        end = match.end()
    if rest := text[end:].strip():
        cells.append(Cell("markdown", rest))
    return cells


def to_ipynb(cells: list[Cell]) -> str:
    """The notebook file (nbformat 4.5) of some cells, without outputs. Links lead to the other notebooks."""
    found = []
    for i, cell in enumerate(cells):
        is_code = cell.kind == "code"
        text = cell.text if is_code else re.sub(r"\((\d\d-[\w-]+)\.md\)", r"(\1.ipynb)", cell.text)
        about: dict[str, object] = {"id": f"cell-{i}", "cell_type": cell.kind, "source": text}
        about["metadata"] = {"tags": list(cell.tags)} if cell.tags else {}
        found.append(about | ({"execution_count": None, "outputs": []} if is_code else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1)
