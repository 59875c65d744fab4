"""Build the documentation with mkdocs: docs/, README.md and the executed course. It needs no network.

    python scripts/build_docs.py              # needs pip install -e ".[docs]"; out/docs/site/index.html
    python scripts/build_docs.py --full       # the course at its full size: many minutes
    python scripts/build_docs.py --no-course  # its text only

Notebooks run one after the other, each in its own process. A notebook that fails ends the build.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lama.course import Cell, notebooks, read_notebook  # noqa: E402

WORK = ROOT / "out" / "docs"
PAGES, SITE = WORK / "pages", WORK / "site"
LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?://|#)([^)\s]+)\)")


def copy_pages() -> None:
    """Copy docs/ and README.md, with their links as the site needs them."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for page in PAGES.glob("*.md"):
        page.write_text(with_links(page.read_text("utf-8"), ROOT / "docs"), "utf-8")
    (PAGES / "index.md").write_text(with_links((ROOT / "README.md").read_text("utf-8"), ROOT), "utf-8")
    (PAGES / "course.css").write_text(STYLE, "utf-8")


SMALL_NOTE = (
    "*The outputs below are from the small size. The text describes the full one: "
    "run `lama course` to see it.*"
)
STYLE = """.md-grid { max-width: 75rem; }
.course-output { border-left: 3px solid var(--md-default-fg-color--lightest); }
.course-output { padding-left: .8em; overflow: auto; }
.course-output iframe { width: 100%; }
"""


def with_links(text: str, folder: Path) -> str:
    """Replace a link to a page by that of the site, and one to another file by the file's name."""

    def replaced(match: re.Match[str]) -> str:
        label, target = match.groups()
        path, hash_, anchor = target.partition("#")
        file = (folder / path).resolve()
        if file.is_relative_to(ROOT / "docs"):
            return f"{label}({file.relative_to(ROOT / 'docs').as_posix()}{hash_}{anchor})"
        if file.parent == ROOT / "lama" / "course":
            return f"{label}(course/{file.name})"
        return f"`{file.relative_to(ROOT).as_posix()}`" if label == f"[{path}]" else f"{label[1:-1]}"

    parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def run_course(full: bool) -> None:
    """Execute every notebook and write it with its outputs. Ends the process for one that fails."""
    (PAGES / "course").mkdir()
    for path in notebooks():
        started = time.perf_counter()
        command = [sys.executable, __file__, "--execute", str(path), *(["--full"] if full else [])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=WORK, env=environment())
        if done.returncode:
            sys.exit(f"{path.name}: {done.stderr.strip()[-3000:]}")
        print(f"{path.name}: {time.perf_counter() - started:.1f} s", flush=True)
        outputs = json.loads(done.stdout.splitlines()[-1])
        (PAGES / "course" / path.name).write_text(rendered(read_notebook(path), outputs, not full), "utf-8")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


def rendered(cells: list[Cell], outputs: list[list[str]], small: bool) -> str:
    """A notebook as a page: `outputs` has HTML for each cell. A small one says so below its title."""
    parts = []
    if small and any("SMALL" in cell.text for cell in cells if cell.kind == "code" and not cell.tags):
        first = cells[0].text.replace("\n", f"\n\n{SMALL_NOTE}\n", 1)
        cells = [Cell("markdown", first), *cells[1:]]
    for cell, shown in zip(cells, outputs, strict=True):
        parts.append(cell.text if cell.kind == "markdown" else f"```python\n{cell.text}\n```")
        if shown:
            parts.append(f'<div class="course-output">{"".join(shown)}</div>')
    return "\n\n".join(parts) + "\n"


def execute(path: Path, full: bool) -> list[list[str]]:
    """Run a notebook's cells in this process; returns their outputs as HTML."""
    import ast
    import contextlib
    import io

    space: dict[str, object] = {"__name__": "__main__"}
    found: list[list[str]] = []
    for number, cell in enumerate(read_notebook(path)):
        shown: list[str] = []
        found.append(shown)
        if cell.kind == "markdown":
            continue
        space["display"] = lambda value, shown=shown: shown.append(as_html(value))
        tree = ast.parse(cell.text)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(tree, f"{path.name} cell {number}", "exec"), space)
            value = None
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"{path.name} cell {number}", "eval"), space)
        if "parameters" in cell.tags:
            space["SMALL"] = not full
        if text := out.getvalue():
            shown.insert(0, f"<pre>{html.escape(text)}</pre>")
        if value is not None:
            shown.append(as_html(value))
    return found


def as_html(value: object) -> str:
    draw = getattr(value, "_repr_html_", None)
    # Markdown would read an empty line as the end of the HTML.
    found = draw() if draw is not None else f"<pre>{html.escape(repr(value))}</pre>"
    return re.sub(r"\n\s*\n", "\n", str(found))


def build() -> None:
    """Run mkdocs. Ends the process where it is missing or complains."""
    config = ROOT / "docs" / "mkdocs.yml"
    try:
        import mkdocs  # noqa: F401
    except ImportError:
        sys.exit('lama: the site needs mkdocs; pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config)]
    done = subprocess.run(
        command, env=environment() | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    )
    if done.returncode:
        sys.exit("lama: mkdocs found faults in the pages; they are listed above")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the documentation site in out/docs/site.")
    parser.add_argument("--full", action="store_true", help="run the course at its full size")
    parser.add_argument("--no-course", action="store_true", help="do not run the course")
    parser.add_argument("--execute", type=Path, help="run one notebook and print its outputs as JSON")
    args = parser.parse_args()
    if args.execute:
        print(json.dumps(execute(args.execute, args.full)))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    copy_pages()
    if args.no_course:
        (PAGES / "course").mkdir()
        for path in notebooks():
            cells = read_notebook(path)
            (PAGES / "course" / path.name).write_text(rendered(cells, [[] for _ in cells], False), "utf-8")
    else:
        run_course(args.full)
    build()
    print(f"{SITE / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
