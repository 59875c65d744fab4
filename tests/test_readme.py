"""README.md's two lines are what is tested: .ci/run and the fresh-install script read them from there."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "check_fresh_install.py"
readme_line = runpy.run_path(str(SCRIPT))["readme_line"]


def test_run_line_installs_and_generates() -> None:
    install = "python3 -m venv .venv && .venv/bin/pip install -e . && "
    assert readme_line("run") == install + '.venv/bin/python gpt.py -p "How can entropy be reversed?"'
    assert (ROOT / "gpt.py").is_file()


def test_test_line_installs_what_the_tests_need_and_runs_all() -> None:
    assert (
        readme_line("test")
        == 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/python -m pytest'
    )
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert "pytest" in tomllib.load(file)["project"]["optional-dependencies"]["dev"]


@pytest.mark.parametrize("name", ["run", "test"])
def test_script_prints_the_line_as_the_readme_has_it(name: str) -> None:
    said = subprocess.check_output([sys.executable, SCRIPT, "--print", name], text=True).removesuffix("\n")
    assert said == readme_line(name)
    assert f"```sh\n{said}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_line_that_is_not_there_once_is_an_error(tmp_path: Path) -> None:
    block = "<!-- line: run -->\n```sh\n{}\n```\n"
    readme = tmp_path / "README.md"
    for text in (
        "",
        block.format("a") * 2,
        block.format("a\nb"),
        "<!-- line: run -->\n\ntext\n" + block.format("a").replace("run", "test"),
    ):
        readme.write_text(text)
        with pytest.raises(ValueError, match="must have one line of shell after <!-- line: run -->"):
            readme_line("run", readme)
    readme.write_text("# lama\n" + block.format('echo "é"') + "more\n", encoding="utf-8")
    assert readme_line("run", readme) == 'echo "é"'


def test_ci_runs_the_readme_line_and_has_no_copy_of_it() -> None:
    ci = ROOT / ".ci" / "run"
    text = ci.read_text(encoding="utf-8")
    assert (
        'line="$(python3 scripts/check_fresh_install.py --print test)"' in text and 'bash -c "$line"' in text
    )
    assert "-m venv" not in text
    assert os.access(ci, os.X_OK)


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell's PATH")
def test_fresh_machine_has_no_compiler_and_python_works_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_RETRIES", "3")
    monkeypatch.setenv("CC", "/usr/bin/gcc")
    env = runpy.run_path(str(SCRIPT))["bare_environment"](tmp_path)
    assert env["PIP_RETRIES"] == "3" and not {"CC", "CACHEDB", "HF_HOME", "DEV"} & set(env)
    assert not [name for name in os.listdir(tmp_path / "bin") if re.search(r"clang|gcc|^cc$|zig", name)]
    assert os.listdir(env["HOME"]) == os.listdir(env["XDG_CACHE_HOME"]) == []
    code = "import sys, venv, shutil; print(sys.version_info[:2], shutil.which('cc'), shutil.which('clang'))"
    said = subprocess.check_output(
        ["sh", "-c", f"python3 -c {shlex.quote(code)}"], env=env, text=True
    ).strip()
    assert said == f"{sys.version_info[:2]} None None"
