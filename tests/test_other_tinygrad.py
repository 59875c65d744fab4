"""Another release of tinygrad than the tested ones: one line says so, and lama runs on plain tinygrad."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lama.runtime.release import TESTED

ROOT = Path(__file__).parents[1]
NOTE = "is not a release that lama was tested with"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def lama_there(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`lama` in an environment of its own, with the newest other release that pip finds in the range."""
    folder = tmp_path_factory.mktemp("other")
    python = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    others = "tinygrad" + ",".join(f"!={release}" for release in TESTED)
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", others, ROOT], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"pip brings no other tinygrad: {(done.stderr.splitlines() or [''])[-1]}")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["CACHEDB"] = str(folder / "cache.db")
        command = [python, "-m", "lama", *arguments]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_generation_is_the_same(lama_there: Run):
    arguments = ["generate", "-m", "lama-bpe", "-p", "In the beginning", "-n", "20", "--temperature", "0"]
    there = lama_there(*arguments)
    here = subprocess.run(
        [sys.executable, "-m", "lama", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert there.stdout == here.stdout != ""
    assert there.stderr.count("\n") == 1 and NOTE in there.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_other_precisions_generate(lama_there: Run, dtype: str):
    done = lama_there("generate", "-m", "lama-bpe", "-p", "And God", "-n", "5", "--dtype", dtype)
    assert done.returncode == 0 and done.stdout.startswith("And God"), done.stderr


@pytest.mark.slow
def test_a_model_is_trained_and_saved(lama_there: Run):
    shape = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context-length", "16"]
    done = lama_there(
        "train", "--corpus", str(ROOT / "tests/earlier/corpus.txt"), "--steps", "5", *shape, "--out", "run"
    )
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    done = lama_there("generate", "-m", "run", "-p", "And", "-n", "5")
    assert done.returncode == 0 and done.stdout.startswith("And"), done.stderr


@pytest.mark.slow
def test_doctor_says_which_release_it_is(lama_there: Run):
    done = lama_there("doctor")
    assert "not a tested release" in done.stdout and done.returncode == 0, done.stdout
