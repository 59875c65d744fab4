"""What a contributor starts from: the dev container, pre-commit, the contributing page."""

import json
import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
CONTAINER = REPOSITORY / ".devcontainer"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]


def test_dev_container_builds_its_own_dockerfile_and_installs_what_developers_need():
    config = json.loads((CONTAINER / "devcontainer.json").read_text("utf-8"))
    assert (CONTAINER / config["build"]["dockerfile"]).is_file()
    assert "pip install -e '.[dev]'" in config["postCreateCommand"]
    assert config["remoteUser"] == config["build"]["args"]["USERNAME"]


def test_dockerfile_has_a_python_that_lama_runs_on_a_compiler_and_another_user_than_root():
    lines = re.sub(r"\\\n", " ", (CONTAINER / "Dockerfile").read_text("utf-8")).splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {word for word, _ in instructions} <= {"FROM", "RUN", "ARG", "USER"}
    version = re.match(r"python:(\d+)\.(\d+)-", dict(instructions)["FROM"])
    least = re.match(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert version and least and tuple(map(int, version.groups())) >= tuple(map(int, least.groups()))
    installs = [text for word, text in instructions if word == "RUN" and "apt-get install" in text]
    assert len(installs) == 1 and "clang" in installs[0] and "rm -rf /var/lib/apt/lists" in installs[0]
    assert instructions[-1] == ["USER", "${USERNAME}"]


def test_pre_commit_runs_what_the_dev_extra_installs():
    text = (REPOSITORY / ".pre-commit-config.yaml").read_text("utf-8")
    tools = set(re.findall(r"entry: python -m (\w+)", text))
    assert (
        tools
        == {"ruff", "mypy"}
        <= {re.split(r"[<>=]", name)[0] for name in PROJECT["optional-dependencies"]["dev"]}
    )


def test_contributing_page_is_one_screen_and_names_files_that_are_there():
    page = (REPOSITORY / "docs" / "CONTRIBUTING.md").read_text("utf-8")
    assert len(page.splitlines()) <= 50
    for path in re.findall(r"`((?:tests|\.ci|\.devcontainer)/[\w./]*)`", page):
        assert (REPOSITORY / path).exists(), path
