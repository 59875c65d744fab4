"""scripts/bench_training.py runs, and its PyTorch does what lama does. Nothing here looks at a time."""

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tinygrad.nn.state import get_state_dict

from lama.generation import Runner
from lama.models.gpt import GPT, GPTConfig
from lama.training.loop import Trainer, language_model_batches
from lama.training.settings.base import TrainingConfig

SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = {"d_model": 22, "n_layers": 1, "n_heads": 2, "context_length": 7, "batch_size": 4}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPTS / "bench_training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole_runs(folder: Path, *flags: str) -> tuple[str, dict]:
    """Of two steps, for one seed; the output, and the figures in its last line."""
    (folder / "text.txt").write_text("to be or not to be: " * 30)
    (folder / "tiny.toml").write_text(
        'tokenizer = "character"\n' + "".join(f"{name} = {value}\n" for name, value in TINY.items())
    )
    command = [sys.executable, SCRIPTS / "bench_training.py", "--run", "tiny.toml", "--corpus", "text.txt"]
    done = subprocess.run(
        [*command, "--steps", "2", "--seeds", "3", "--json", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_whole_run_of_lama_is_measured(tmp_path: Path):
    text, figures = whole_runs(tmp_path, "--libraries", "lama")
    (run,) = figures["results"]["lama"]
    assert 1 < run["loss"] < 3 and 1 < run["first_loss"] < 3
    assert 0 < run["ms_per_step"] / 1e3 <= run["steps_s"] + 1e-6 < run["all_s"]
    assert f"| lama | {run['loss']:.4f} |" in text


def test_steps_of_lama_are_measured(bench: ModuleType, capsys: pytest.CaptureFixture[str]):
    found, peaks, left_out = bench.measure_steps("tiny", TINY, 7, ["lama"], rounds=3, steps=2)
    assert list(found) == ["lama"] and not left_out and len(found["lama"]) == 3 and min(found["lama"]) > 0
    assert len(peaks) == 3 and (None in peaks or min(peaks) > 1e8)
    assert "tiny: round 3 of 3: lama " in capsys.readouterr().err


def test_compiled_pytorch_is_left_out_where_it_does_not_work(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Its compiler is asked for with the first step."""

    def trainer_of(library: str, *_: object) -> Iterator[None]:
        if library == "torch.compile":
            raise RuntimeError("No working C++ compiler found\nand more")
        return itertools.repeat(None)

    monkeypatch.setattr(bench, "trainer_of", trainer_of)
    found, _, left_out = bench.measure_steps("tiny", TINY, 7, bench.LIBRARIES, rounds=1, steps=1)
    assert list(found) == ["lama", "torch"] and left_out == {"torch.compile": "No working C++ compiler found"}
    monkeypatch.setattr(bench, "trainer_of", lambda *_: iter([]))
    with pytest.raises(StopIteration):  # of the others it is an error
        bench.measure_steps("tiny", TINY, 7, ["torch"], rounds=1, steps=1)


def test_share_of_the_peak_is_the_rounds_own(bench: ModuleType):
    figures = {"operations_per_step": 3e9, "peak_flops": [1e11, 2e11, 4e11]}
    assert bench.share_of_peak([60, 30, 10], figures) == "50% of 200 GFLOP/s"  # 50 %, 50 %, 75 %
    assert bench.share_of_peak([60], {**figures, "peak_flops": [None]}) == ""


@pytest.mark.peers
def test_pytorchs_run_is_measured_beside_lamas(tmp_path: Path):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    text, figures = whole_runs(tmp_path)
    ours, theirs = (figures["results"][library][0] for library in ("lama", "torch"))
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.3)  # other weights of the same distribution
    assert figures["ratios"]["torch"]["all_s"] == [theirs["all_s"] / ours["all_s"]]
    assert "torch's time / lama's by seed" in text


GPT2 = GPTConfig(23, 7, d_model=22, n_layers=2, n_heads=2, bias=False, activation="gelu")
LLAMA_PARTS = {"activation": "silu", "gated": True, "norm_kind": "rms", "positions": "rope"}
LLAMA = GPTConfig(23, 7, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_mlp=40, bias=False, **LLAMA_PARTS)


def peers_weights(model: GPT) -> dict[str, np.ndarray]:
    """The weights of lama's model by the peer's names."""
    return {
        name.replace(".attn.", ".").replace(".mlp.", "."): p.numpy().copy()
        for name, p in get_state_dict(model).items()
    }


@pytest.mark.peers
@pytest.mark.parametrize(("shape", "accumulation"), [(GPT2, 1), (GPT2, 2), (LLAMA, 1)])
def test_the_peer_takes_lamas_steps(shape: GPTConfig, accumulation: int, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import torch_gpt

    config = TrainingConfig(steps=5, batch_size=4, accumulation=accumulation, learning_rate=1e-2, warmup=2)
    batches = language_model_batches(np.random.default_rng(0).integers(0, 23, 500), config, 7)
    model, peer = GPT(shape, seed=3), torch_gpt.Trainer(shape, batches, config)
    weights = peers_weights(model)
    for name, p in peer.model.named_parameters():  # drawn as lama's are
        assert p.detach().numpy().std() == pytest.approx(weights[name].std(), rel=0.25, abs=1e-6), name
    peer.model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    ours = [(step.loss, step.gradient_norm) for step in Trainer(model, batches, config)]
    np.testing.assert_allclose(ours, list(peer), rtol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("shape", [GPT2, LLAMA])
def test_the_peer_generates_what_lama_does(shape: GPTConfig, monkeypatch: pytest.MonkeyPatch):
    """A prompt, then tokens behind it, from one cache."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import torch_gpt

    model, peer = GPT(shape, seed=3), torch_gpt.GPT(shape).eval()
    peer.load_state_dict({name: torch.from_numpy(value) for name, value in peers_weights(model).items()})
    tokens = np.random.default_rng(0).integers(0, 23, (1, 6))
    runner = Runner(model)
    peer.new_caches(1, 7)
    ours = [runner.prefill(tokens[:, :4]), *(runner.decode(tokens[:, i]) for i in (4, 5))]
    with torch.no_grad():
        for logits, (start, end) in zip(ours, ((0, 4), (4, 5), (5, 6)), strict=True):
            fed = torch.from_numpy(tokens[:, start:end])
            theirs = peer.logits(fed, torch.arange(start, end)).numpy()
            np.testing.assert_allclose(logits, theirs, atol=1e-5)


def test_profile_has_every_kernel_of_a_step_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(SCRIPTS)
    import profile_cpu

    monkeypatch.setitem(profile_cpu.CONFIGS, "cpu", TINY)
    profile_cpu.main(["cpu", "--repeats", "2", "--top", "3"])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert [row[0] for row in rows[-2:]] == ["others", "all"] and len(rows) == 6
    times, ms = ([float(row[i]) for row in rows[1:]] for i in (1, 2))
    assert sum(times[:-1]) == times[-1] > 20 and sum(ms[:-1]) == pytest.approx(ms[-1], abs=0.03)
    assert rows[-1][3:] == ["100.0%", rows[-1][4]] and rows[-1][4].endswith("%")
