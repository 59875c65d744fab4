"""Docstrings follow docs/style.md: their openings, summaries of one line, and words of standard English."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 110
OPENINGS = ("What", "Of", "Those", "As", "By", "Which", "Where", "There", "That")
PRIVATE = (
    r"by heart|anew|what is there|that (?:is|are) none|go(?:es)? on|apart|maker|hands? (?:on|over)"
    r"|as it stands|a person types|at the keyboard|beside each other|upon each other"
)


def python_files() -> list[Path]:
    doors = [ROOT / "gpt.py", ROOT / "transformer.py"]
    return [*doors, *sorted((ROOT / "lama").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of all docstrings, those of attributes and constants included."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def faults(text: str) -> Iterator[str]:
    summary, _, rest = text.partition("\n")
    first = re.match(r"\w+", summary)
    if first and first[0] in OPENINGS:
        yield f"opens with {first[0]}: name the thing, or say what is done"
    if rest.partition("\n")[0].strip():
        yield "the summary must fit on the first line"
    if len(summary) > LONGEST:
        yield f"the summary has over {LONGEST} characters"
    for found in re.findall(rf"\b(?:{PRIVATE})\b", text, re.IGNORECASE):
        yield f"{found!r} is no standard English here"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_follow_the_style(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = []
    for line, text in docstrings(path.read_text(encoding="utf-8")):
        found += [f"{name}:{line}: {fault}" for fault in faults(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("What it does.", "opens with What"),
        ("Of a model, its size.", "opens with Of"),
        ("The size\nof a model.", "first line"),
        ("Learn it by heart.", "'by heart'"),
        ("x" * 111, "over 110"),
        ("Offer a size.\n\n    As large as possible.\n", ""),
        ("`what` it does", ""),
    ],
)
def test_faults_are_found(text: str, fault: str) -> None:
    found = list(faults(text))
    assert len(found) == bool(fault) and fault in "".join(found)
