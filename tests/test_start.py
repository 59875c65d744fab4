"""The start of a process: what is imported and opened, and `lama doctor --start`."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_kernels import needs_c

import lama
from lama import timing
from lama.cli import Parser, doctor, main, start
from lama.errors import LamaError, UsageError

ROOT = Path(lama.__file__).parents[1]
UNNEEDED = (
    "tinygrad.renderer.nir",
    "tinygrad.renderer.isa.x86",
    "tinygrad.runtime.autogen.mesa",
    "tinygrad.runtime.ops_cuda",
    "lama.training",
    "lama.cli.train",
    "jaxtyping",
    "torch",
    "numpy.ma",
)


def modules_after(*words: str, **environment: str) -> set[str]:
    """The modules that a command has loaded at its end, in a process of its own."""
    code = (
        "import io, sys; from contextlib import redirect_stdout, suppress; from lama.cli import main\n"
        "with redirect_stdout(io.StringIO()), suppress(SystemExit): main(sys.argv[1:])\n"
        "print(*sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "DEV": "CPU"} | environment
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["help", "generate"]], ids=" ".join)
def test_help_and_version_import_neither_numpy_nor_tinygrad(words: list[str]) -> None:
    loaded = modules_after(*words)
    assert sorted(loaded & {"numpy", "tinygrad"}) == []
    verbs = {name for name in loaded if name.startswith("lama.cli.")}
    assert ("lama.cli.train" in verbs) == (words == ["--help"])
    assert not (words == ["--version"] and verbs)


def test_an_unknown_verb_is_named_beside_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    assert "Did you mean generate?" in capsys.readouterr().err


@needs_c
def test_generate_on_the_cpu_imports_only_what_it_uses(tiny_gpt2: Path) -> None:
    loaded = modules_after("generate", "-m", str(tiny_gpt2), "-p", "Hello", "-n", "1")
    assert "tinygrad.runtime.ops_cpu" in loaded
    assert sorted(loaded & set(UNNEEDED)) == []


@needs_c
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a renderer for x86-64")
def test_a_renderer_that_dev_names_is_the_real_one() -> None:
    code = (
        "from lama.runtime.device import open_device; open_device()\n"
        "from tinygrad import Device, Tensor\n"
        "print(type(Device['CPU'].renderer).__module__, (Tensor([1.0, 2.0]) + 1).tolist())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "DEV": "CPU:X86"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "tinygrad.renderer.isa.x86 [2.0, 3.0]\n", done.stderr


def test_parts_of_a_clock_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([12.0, 13.0, 17.0, 18.0, 20.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(moments))
    clock = timing.Clock("Python", 10.0)
    monkeypatch.setattr(timing, "clock", clock)
    clock.switch("work")  # at 12
    with timing.timed("load"), timing.timed("read"):  # at 13; at 17, to 18
        pass
    assert clock.seconds == {"Python": 2.0, "work": 1.0, "load": 6.0, "read": 1.0}
    assert sum(clock.seconds.values()) == 20.0 - 10.0


def test_nothing_is_measured_without_a_clock() -> None:
    assert timing.clock is None
    with timing.timed("load"):
        pass


@needs_c
def test_doctor_shows_parts_that_sum_to_the_start(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "RUNS", 1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run("--start", "-m", str(tiny_gpt2)) == 0
    rows = re.findall(r"^(.+?) +\| +([\d.]+) \| +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    seconds = {name: float(number) for name, number, _ in rows}
    whole = seconds.pop("start to first token")
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.0006 * len(rows))
    assert {"Python itself", "import tinygrad", "import numpy", "the tokenizer"} <= seconds.keys()
    assert {"loading the weights", "opening the device", "prefill and the first token"} <= seconds.keys()
    assert sum(float(share) for *_, share in rows[:-1]) == pytest.approx(100, abs=0.06 * len(rows))


def run(*argv: str) -> int:
    parser = Parser()
    doctor.add_parser(parser.add_verbs("verb"))
    args = parser.parse_args(["doctor", *argv])
    return int(args.run(args))


def test_doctor_of_a_model_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(LamaError, match="lama generate failed, so its start cannot be measured"):
        run("--start", "-m", str(tmp_path / "none"))
    assert "which does not exist" in capfd.readouterr().err


def test_a_model_is_only_for_the_start() -> None:
    with pytest.raises(UsageError, match="-m names the model for --start"):
        run("-m", "gpt2")


def test_measured_command_prints_its_parts_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "clock", timing.Clock("Python itself", timing.time.perf_counter()))
    monkeypatch.setattr(start.cli, "main", lambda words: print(*words) or 3)
    assert start.run_measured(["generate"]) == 3
    assert json.loads(capsys.readouterr().out).keys() == {"Python itself"}
