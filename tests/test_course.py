"""The course: its notebooks are whole, its exercises know right from wrong, and all of it runs.

scripts/build_docs.py runs the notebooks at their small size; .ci/run calls it.
"""

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from lama.cli import main
from lama.course import Cell, notebooks, read_notebook, title, to_ipynb
from lama.course.check import EXERCISES, check
from lama.errors import UsageError

ROOT = Path(__file__).parent.parent


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal_attention(q, k, v):
    scores = q @ k.T / math.sqrt(q.shape[-1])
    return softmax(np.where(np.tri(len(q), dtype=bool), scores, -np.inf)) @ v


def merge(ids, pair, new):
    found, i = [], 0
    while i < len(ids):
        hit = tuple(ids[i : i + 2]) == pair
        found.append(new if hit else ids[i])
        i += 2 if hit else 1
    return found


def wave(p, i, d):
    angle = p / 10000 ** (i // 2 * 2 / d)
    return math.cos(angle) if i % 2 else math.sin(angle)


def nucleus(p, share):
    order = np.argsort(-p)
    return set(order[: 1 + int((p[order].cumsum() < share - 1e-9).sum())].tolist())


# A right and a wrong answer to each exercise.
ANSWERS = {
    "merge": (merge, lambda ids, pair, new: ids),
    "entropy": (2, 1),
    "wave": (wave, lambda p, i, d: 0.0),
    "angle": (7, 3.5),
    "softmax": (softmax, lambda x: x / x.sum()),
    "causal_attention": (causal_attention, lambda q, k, v: v),
    "layernorm": (
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
        lambda x: x - x.mean(-1, keepdims=True),
    ),
    "block_size": (lambda d: 12 * d * d + 13 * d, lambda d: 12 * d * d),
    "guessing": (math.log, lambda v: 1 / v),
    "loss": (lambda x, target: math.log(np.exp(x).sum()) - x[target], lambda x, target: -x[target]),
    "nucleus": (nucleus, lambda p, share: set(range(len(p)))),
    "passes": (lambda n: n * (n + 1) // 2, lambda n: n),
    "previous": (lambda a: np.diagonal(a, -1).mean(), lambda a: np.diagonal(a).mean()),
    "previous_head": ((2, 1), (0, 3)),
    "mask": (
        lambda n, causal: np.tri(n, dtype=bool) if causal else np.ones((n, n), bool),
        lambda n, causal: np.tri(n, dtype=bool),
    ),
    "masked": (120, 150),
    "waves": (lambda a, b, c, k, p: math.cos(2 * math.pi * k * (a + b - c) / p), lambda a, b, c, k, p: c),
    "uniform": (math.log(59), 1.0),
    "operations": (lambda n: 2 * n**3, lambda n: n**3),
    "intensity": (0.5, 2),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise_knows_a_right_answer_from_a_wrong_one(name: str) -> None:
    right, wrong = ANSWERS[name]
    assert check(name, right).is_right is True
    verdict = check(name, wrong)
    assert verdict.is_right is False and repr(verdict).startswith("✗ not yet. ")
    assert check(name, ...).is_right is None


def test_answers_in_another_count_or_rounded_are_right() -> None:
    assert check("operations", lambda n: n**2 * (2 * n - 1)).is_right
    assert check("uniform", 4.08).is_right and not check("uniform", 4.0).is_right


def test_answers_that_are_none_yet_or_fail_are_told_apart() -> None:
    assert repr(check("softmax", lambda x: ...)) == "… not answered yet"
    assert check("softmax", lambda x: None).is_right is None
    assert "ZeroDivisionError" in repr(check("softmax", lambda x: 1 / 0))
    assert "<b>✓ right</b>" in check("masked", 120)._repr_html_()
    with pytest.raises(UsageError, match=r"no exercise 'softmaxx'\. Did you mean softmax"):
        check("softmaxx", 1)


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebook_is_whole(path: Path) -> None:
    text, cells = path.read_text("utf-8"), read_notebook(path)
    assert [cell.text for cell in cells if "parameters" in cell.tags] == ["SMALL = False"]
    asked = re.findall(r'^check\("(\w+)"', text, re.MULTILINE)
    assert len(asked) == 2 and set(asked) <= set(EXERCISES), asked
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        assert (path.parent / target).is_file(), target
    shows_code = "inspect.getsource(" in text or 'resources.files("lama.kernels")' in text
    assert shows_code and re.match(r"\d+\. ", title(path))
    assert "## What you have seen" in text


def test_every_exercise_is_asked_once() -> None:
    text = "".join(path.read_text("utf-8") for path in notebooks())
    assert sorted(re.findall(r'^check\("(\w+)"', text, re.MULTILINE)) == sorted(EXERCISES)
    assert len(notebooks()) == 10


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_cells_are_those_of_jupytext(path: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    theirs = jupytext.read(path).cells
    ours = read_notebook(path)
    code = [cell.source for cell in theirs if cell.cell_type == "code"]
    assert [cell.text for cell in ours if cell.kind == "code"] == code
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.reads(to_ipynb(ours), as_version=4))


def test_links_between_notebooks_lead_to_notebooks() -> None:
    text = to_ipynb([Cell("markdown", "[a](02-embeddings.md) [b](x.md)"), Cell("code", "f(02-a.md)")])
    assert "[a](02-embeddings.ipynb) [b](x.md)" in text and "f(02-a.md)" in text


def test_course_is_written_once_and_answers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["course", "--no-open"]) == 0
    files = sorted((tmp_path / "lama-course").iterdir())
    assert [file.stem for file in files] == [path.stem for path in notebooks()]
    files[0].write_text("mine")
    capsys.readouterr()
    assert main(["course", "--no-open"]) == 0
    assert files[0].read_text() == "mine" and "is kept as it is" in capsys.readouterr().err
    assert main(["course", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("3. Attention")


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebook_runs_at_its_full_size(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "scripts" / "build_docs.py"), run_name="build_docs")
    assert any(script["execute"](path, True))


@pytest.mark.slow
def test_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.reads(to_ipynb(read_notebook(notebooks()[2])), as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert any("text/html" in out.get("data", {}) for out in shown)
