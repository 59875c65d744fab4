"""scripts/bench_cpu.py runs with what is installed, and says what is not. Nothing here looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lama.checkpoints import export_gguf
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import ByteTokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_cpu.py"


def bench(tmp_path: Path, *flags: str | Path) -> tuple[list[list[str]], dict]:
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
        tmp_path, "--only", "decode,prefill,memory", "--weights", "float32", "--engines", "none"
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
    limits = decode["limits"]["float32"][0]
    assert limits["bytes_read"] == 4 * (50257 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64)
    assert limits["operations"] == 2 * 2 * (12 * 64**2 + 512 * 64)


def test_start_is_timed_with_and_without_a_cache(tmp_path: Path):
    rows, figures = bench(tmp_path, "--only", "start", "--weights", "float32", "--engines", "none")
    work = ["start to first token float32, s", "the same, empty cache", "lama --help, s", "lama --version, s"]
    assert [row[0] for row in rows] == work
    found = figures["figures"]["start float32"]
    assert len(found["seconds"]["lama float32"]) == 2 and found["empty_cache_s"] > 0


def test_gguf_file_and_batches_are_measured(tmp_path: Path):
    """The programs of llama.cpp are not given here."""
    shape = {"activation": "silu", "gated": True, "norm_kind": "rms", "positions": "rope", "bias": False}
    model = GPT(GPTConfig(258, 1024, d_model=64, n_layers=1, n_heads=2, n_kv_heads=1, **shape))
    export_gguf(tmp_path / "tiny.gguf", model, ByteTokenizer(), "tiny")
    only = "decode,batch", "--weights", "gguf", "--gguf", tmp_path / "tiny.gguf"
    rows, figures = bench(tmp_path, "--only", *only, "--engines", "llama-batched-bench")
    assert rows[0][:4] == ["tiny", "", "llama-batched-bench", "left out: not given: --llama-tools"]
    batches = [f"batch of {n} tiny, tokens/s" for n in (2, 4, 8, 16, 32)]
    assert [row[0] for row in rows[1:]] == ["decode tiny, tokens/s", *batches]
    assert all(row[1] for row in rows[1:]) and "lama" in figures["processor"]


def test_precision_that_the_processor_lacks_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import bench_cpu

    monkeypatch.setattr(bench_cpu, "cpuinfo", lambda *_: "fpu avx2")
    for name in ("LAMA_THREADS", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # main sets them
        monkeypatch.setenv(name, "2")
    bench_cpu.main(["--only", "train", "--precisions", "bfloat16", "--threads", "2"])
    printed = capsys.readouterr().out
    assert ": avx2; lama's compiled code " in printed
    assert "| training step bfloat16 |  |  | left out: the processor multiplies no bfloat16 |" in printed


def test_engine_that_is_missing_or_fails_is_a_row(tmp_path: Path):
    """CTranslate2 is in no extra but `bench`."""
    rows, _ = bench(tmp_path, "--only", "prefill", "--weights", "float32", "--engines", "CTranslate2")
    assert [row[0] for row in rows if row[1]] == ["prefill float32, tokens/s"]
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        absent = ["float32", "", "CTranslate2 float32", "left out: not installed: ctranslate2"]
        assert absent in [row[:4] for row in rows] or "torch" in str(rows)


def test_figures_of_llamacpps_programs_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Their forms of JSON: llama-bench's list, llama-batched-bench's line among others."""
    printed = {
        "llama-bench": '[\n {"n_prompt": 4, "avg_ts": 8.0}\n]',
        "llama-batched-bench": 'x\n{"t_tg": 3.0}\n',
    }
    for name, text in printed.items():
        (tmp_path / name).write_text(
            f"#!{sys.executable}\nimport sys\nassert '-m' in sys.argv\nprint({text!r})"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setenv("LLAMA_TOOLS", str(tmp_path))
    import bench_engines

    (tmp_path / "tiny.gguf").touch()
    tools = bench_engines.LlamaTools("gguf", tmp_path / "tiny.gguf", threads=2)
    assert tools.prefill([1, 2, 3, 4]) == 0.5 and tools.decode([1], 16) == (2, [])
    assert tools.batch([1], rows=2, n=4) == 3


@pytest.mark.parametrize("flags", [("--only", "decode,sleep"), ("--weights", "int7")])
def test_wrong_flags_are_refused(flags: tuple[str, str]):
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
