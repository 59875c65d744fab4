"""Damaged files and random command lines load, or end in one clear line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz.py"


def fuzz(*options: str) -> None:
    done = subprocess.run([sys.executable, FUZZ, *options], capture_output=True, text=True, timeout=3000)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    assert " cases, 0 failures" in done.stdout


@pytest.mark.parametrize("kind", ["models", "runs", "data", "commands"])
def test_random_damage_loads_or_gives_one_line(kind):
    fuzz(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["models", "runs", "data", "commands"])
def test_new_random_damage_loads_or_gives_one_line(kind):
    fuzz(kind, "-n", "3000", "--seed", str(time.time_ns() % 10**9))
