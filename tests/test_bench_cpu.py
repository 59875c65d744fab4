"""scripts/bench_cpu.py runs with what is installed, and says what is not. Nothing here looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_cpu.py"


def bench(tmp_path: Path, *flags: str) -> tuple[list[list[str]], dict]:
    """The table's rows and the figures, of a tiny model."""
    command = [
        sys.executable,
        SCRIPT,
        "--tiny",
        "--rounds",
        "2",
        "--threads",
        "2",
        "--json",
        tmp_path / "figures.json",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]], json.loads(
        (tmp_path / "figures.json").read_text()
    )


def test_lama_is_measured_alone(tmp_path: Path):
    rows, figures = bench(
        tmp_path, "--only", "decode,prefill,memory", "--precisions", "float32", "--engines", "none"
    )
    assert [row[0] for row in rows] == [
        "memory float32",
        "decode float32, tokens/s",
        "prefill float32, tokens/s",
    ]
    assert all(row[1] for row in rows)
    decode = figures["figures"]["decode float32"]
    assert len(decode["tokens_s"]["lama float32"]) == len(decode["read_bytes_s"]) == 2
    assert len(decode["tokens"]["lama float32"]) == 129
    assert decode["limits"]["float32"]["bytes_read"] == 4 * (50257 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64)


def test_start_is_timed_with_and_without_a_cache(tmp_path: Path):
    rows, figures = bench(tmp_path, "--only", "start", "--engines", "none")
    assert [row[0] for row in rows] == ["start to first token, s", "the same, empty cache"]
    assert (
        len(figures["figures"]["start"]["seconds"]["lama float32"]) == 2
        and figures["figures"]["start"]["empty_cache_s"] > 0
    )


def test_engine_that_is_missing_or_fails_is_a_row(tmp_path: Path):
    """CTranslate2 is in no extra but `bench`."""
    rows, _ = bench(tmp_path, "--only", "prefill", "--precisions", "float32", "--engines", "CTranslate2")
    assert [row[0] for row in rows if row[1]] == ["prefill float32, tokens/s"]
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        assert ["float32", "", "CTranslate2 float32", "not installed: ctranslate2"] in [
            row[:4] for row in rows
        ] or "torch" in str(rows)


@pytest.mark.parametrize("flags", [("--only", "decode,sleep"), ("--precisions", "int7")])
def test_wrong_flags_are_refused(flags: tuple[str, str]):
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
