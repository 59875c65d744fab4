"""The documentation holds: every block runs, every command parses, every link and name of the code exists."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ONLY_PARSED, PAGES, ROOT, RUN, blocks, difference, lama_commands, prepare, run_block

from lama.cli import make_parser
from lama.course import Cell

DOCS = ROOT / "docs"
NAMES = ("architecture.md", "adding-a-model.md", "adding-a-kernel.md", "python-api.md")
NAME = re.compile(r"\b(lama(?:\.\w+)+)\b")


def name(page: Path) -> str:
    return page.name


RUNNABLE = [page for page in PAGES if page.name not in ONLY_PARSED]
SLOW = [page for page in RUNNABLE if any(block.is_run and block.is_slow for block in blocks(page))]
FAST = [page for page in RUNNABLE if any(block.is_run and not block.is_slow for block in blocks(page))]


def run_page(page: Path, folder: Path, slow: bool) -> None:
    env, seconds = prepare(folder), 3600 if slow else 120
    chosen = [block for block in blocks(page) if block.is_run and (slow or not block.is_slow)]
    for block in chosen:
        if block.kind != "python":
            run_block(block, folder, env, seconds)
    if code := "\n".join(block.text for block in chosen if block.kind == "python"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{page.name}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell's commands")
@pytest.mark.parametrize("page", FAST, ids=name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_slow_blocks_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, slow=True)


def test_no_block_is_left_out_without_a_reason() -> None:
    for page in RUNNABLE:
        for block in blocks(page):
            marked = re.fullmatch(r"(?:not run|slow|line): \S.*", block.mark)
            assert marked or not block.mark, f"{page.name}:{block.line}: {block.mark}"
            at = f"{page.name}:{block.line}: a block must name its kind, such as sh or text"
            assert block.kind, at
            assert "$ " not in block.text[:2] or block.kind in RUN, f"{at}: a transcript is console"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_ones_that_lama_has(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in lama_commands(page):
        try:
            words = [*words[1:], "--help"] if words[:1] == ["help"] else words
            make_parser().parse_args(words)
        except SystemExit as end:  # --help, --version
            assert end.code == 0, line
        assert capsys.readouterr().err == "", line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target}"


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_files_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for file in set(re.findall(r"`((?:tests|scripts|lama|docs|weights)/[\w./-]*\w)`", text)):
        known = (ROOT / file).exists() or "NAME" in file or file == "weights/gpt2"
        assert known, f"{page.name}: {file}"
    for file in set(re.findall(r"`(test_\w+\.py)`", text)):
        assert (ROOT / "tests" / file).exists(), f"{page.name}: {file}"


MEASURED = re.compile(
    r"\d[\d,.]*\s?(?:tokens/s|GFLOP/s|GOP/s|GB/s|MB/s|ms\b|seconds\b|minutes\b|% of)|^\|.*\d\.\d.*\|$",
    re.MULTILINE,
)
COMMAND = re.compile(r"\blama [a-z]+|(?:scripts|tests)/\w+\.py|\b(?:bench|test|profile|tune)_\w+\.py")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_measured_figures_have_their_command(page: Path) -> None:
    """A section with figures that were measured names the command, or the test, that prints them."""
    for section in re.split(r"^(?=## )", page.read_text("utf-8"), flags=re.MULTILINE):
        text = re.sub(r"^```.*?^```", "", section, flags=re.DOTALL | re.MULTILINE)
        found = MEASURED.search(text)
        at = f"{page.name}: {section[:40]!r}: {found and found[0]!r}"
        assert found is None or COMMAND.search(section), at


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", [DOCS / each for each in NAMES], ids=name)
def test_names_of_the_code_exist(page: Path) -> None:
    found = set(NAME.findall(page.read_text("utf-8")))
    assert found
    for dotted in sorted(found):
        assert exists(dotted), f"{page.name}: {dotted}"


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"([\w-]+\.md)", (DOCS / "mkdocs.yml").read_text("utf-8")))
    assert {page.name for page in PAGES if page.name != "README.md"} <= listed


def test_readme_fits_nine_kilobytes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


def test_transcripts_are_compared_by_words_and_numbers() -> None:
    assert difference("a 1.00\n[...]\nend", "a 1.01\nmore\nand more\nend\n") == ""
    assert "found" in difference("a 1.0", "a 1.5") and "found" in difference("a b", "a c")
    assert "not shown" in difference("a", "a\nb") and "not printed" in difference("a\nb", "a")


def test_site_without_mkdocs_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "build_docs.py"), run_name="build_docs")
    monkeypatch.setitem(sys.modules, "mkdocs", None)
    with pytest.raises(SystemExit, match=r'lama: the site needs mkdocs; pip install -e "\.\[docs\]"'):
        script["build"]()


def test_links_of_the_site_lead_to_its_pages() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "build_docs.py"), run_name="build_docs")
    text = (
        "[a](docs/models.md#gguf) [b](docs/gallery/lens.png) [c](LICENSE) [LICENSE](LICENSE) [w](https://x.y)"
    )
    found = "[a](models.md#gguf) [b](gallery/lens.png) c `LICENSE` [w](https://x.y)"
    assert script["with_links"](text, ROOT) == found
    course = script["with_links"]("[1](../lama/course/01-tokens.md) `[x](y)`", ROOT / "docs")
    assert course.startswith("[1](course/01-tokens.md)")


def test_pages_of_the_course_say_that_their_outputs_are_small() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "build_docs.py"), run_name="build_docs")
    cells = [Cell("markdown", "# 1. A\n\nText."), Cell("code", "SMALL = False", ("parameters",))]
    sized = [*cells, Cell("code", "n = 2 if SMALL else 3")]
    page = script["rendered"](sized, [[], [], []], True)
    assert page.startswith(f"# 1. A\n\n{script['SMALL_NOTE']}\n\nText.")
    assert script["SMALL_NOTE"] not in script["rendered"](sized, [[], [], []], False)
    assert script["SMALL_NOTE"] not in script["rendered"](cells, [[], []], True)
