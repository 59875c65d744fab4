"""The files of scripts/deploy name commands, flags and files that exist. Nothing is built or started."""

import ast
import json
import re
import subprocess
from pathlib import Path
from shutil import which

import pytest

from lama.cli import make_parser

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "scripts" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")


def instruction(name: str) -> str:
    """The last one's arguments."""
    return re.findall(rf"^{name} +(.+)$", DOCKERFILE, re.MULTILINE)[-1]


def check_serve(words: list[str]) -> None:
    """Raise SystemExit unless `lama serve` has these flags."""
    pytest.importorskip("lama.cli.serve")
    program, *arguments = words
    assert program == "lama"
    make_parser().parse_args(arguments)


def test_the_image_starts_the_server_as_a_user_without_rights():
    check_serve([*json.loads(instruction("ENTRYPOINT")), *json.loads(instruction("CMD"))])
    user = instruction("USER").partition(":")[0]
    assert int(user) > 0 and f"--uid {user}" in instruction("RUN useradd")


def test_the_health_check_is_a_program():
    python, flag, source = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert (python, flag) == ("python", "-c")
    ast.parse(source)
    assert "/health" in source and f":{instruction('EXPOSE')}/" in source


def test_the_image_gets_the_package_and_nothing_else():
    kept = [
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")
    ]
    assert {"pyproject.toml", "README.md", "LICENSE", "lama", "weights/lama-bpe"} <= set(kept)
    assert all((ROOT / name).exists() for name in kept)


def test_compose_reads_the_same_files_and_flags():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["lama"]
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert context == ROOT and (context / service["build"]["dockerfile"]) == DEPLOY / "Dockerfile"
    assert service["user"] == instruction("USER") and service["read_only"] and service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    words = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in service["command"]]
    check_serve([*json.loads(instruction("ENTRYPOINT")), *words])


@pytest.mark.skipif(not which("haproxy"), reason="HAProxy is not installed")
def test_the_load_balancer_has_a_valid_configuration():
    done = subprocess.run(["haproxy", "-c", "-f", DEPLOY / "haproxy.cfg"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
