"""scripts/bench_gpu.py runs on the CPU at a tiny size and names what is absent. Nothing looks at a time."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_gpu

    return bench_gpu


def test_lama_is_measured_without_pytorch(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "use_device", lambda name: None)  # of this process; the workers open it
    files = "--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "table.md")
    bench.main(["--device", "CPU", "--tiny", "--rounds", "2", *files])
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[4:]]
    works = [f"{work} {model}" for model in ("gpt2", "llama") for work in ("decode", "prefill", "train")]
    assert [row[0] for row in rows] == [f"{work}, tokens/s" for work in works]
    assert all(row[1][0].isdigit() and row[2:4] == ["left out: not installed", ""] for row in rows)
    assert [row[4].split()[1] for row in rows] == 2 * ["GB/s", "TFLOP/s", "TFLOP/s"]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert list(found["figures"]) == works and found["device"] == "CPU"
    assert all(len(each["lama"]) == 2 and min(each["lama"]) > 0 for each in found["figures"].values())


def test_worker_that_fails_or_is_late_gives_a_reason(bench: ModuleType):
    load = "from workers import answer_requests\ndef load(): raise ValueError('no such\\nthing')\n"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n{load}"]
    for end, reason in (("answer_requests(load)", "ValueError: no such"), ("exit(3)", "ended with status 3")):
        worker = bench.Worker([*command[:2], f"{command[2]}{end}"])
        assert worker.ready() == reason
        worker.close()
    worker = bench.Worker([sys.executable, "-c", "import time; time.sleep(600)"], seconds=0.1)
    assert worker.ready() == "no answer in 0 s"
    worker.close()


def test_failed_part_is_a_cell(bench: ModuleType):
    config, vocab_size = bench.settings_of("llama", tiny=True)
    shape = bench.model_config(config, vocab_size)
    row = bench.row_of("prefill", "llama", shape, {("prefill", "PyTorch"): [2.0]}, {("prefill", "lama"): "x"})
    assert row == ["prefill llama, tokens/s", "left out: x", "2.00 (2.00–2.00)", ""]


def test_models_have_the_sizes_that_they_are_named_for(bench: ModuleType):
    from lama.models.gpt import GPT
    from lama.models.registry import n_parameters

    sizes = [
        n_parameters(GPT(bench.model_config(*bench.settings_of(name, False)), None)) for name in bench.MODELS
    ]
    assert sizes == [124_439_808, 134_515_008]


@pytest.mark.peers
def test_the_peer_generates_its_likeliest_tokens(bench: ModuleType, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    import torch_gpt

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes minutes
    shape = bench.model_config(*bench.settings_of("llama", tiny=True))
    generator = torch_gpt.Generator(shape, "cpu")
    seconds, made = generator.decode([1, 2, 3], 4)
    assert seconds > 0 and len(made) == 5
    with torch.no_grad():
        hidden = generator.model.hidden(torch.tensor([[1, 2, 3, *made[:-1]]]))  # without a cache
        logits = (hidden @ generator.model.embed.weight.T)[0, 2:].float()
    chosen = logits[torch.arange(5), made]
    assert (logits.max(-1).values - chosen).max() < 0.02  # bfloat16's rounding
