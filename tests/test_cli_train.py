"""`lama train`: what it prints, what it refuses, how it is stopped and goes on."""

import importlib
import io
import json
import math
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import CATS, RUN_FLAGS

import lama
from lama.cli import main, make_parser
from lama.cli import train as cli_train
from lama.cli import training as cli_training
from lama.cli.live import LiveLine
from lama.cli.train import losses_table, opening
from lama.cli.training import command_line
from lama.training.folder import RunFolder, step_of
from lama.training.settings import RunConfig, presets
from lama.training.settings.base import fields_of
from lama.training.trackers import Tracker

SETTINGS = fields_of(RunConfig)

Result = tuple[int, str, str]
Command = Callable[..., Result]


@pytest.fixture
def cats(tmp_path: Path) -> str:
    (tmp_path / "cats.txt").write_text(CATS)
    return str(tmp_path / "cats.txt")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `lama train` here; its exit code, standard output and standard error."""

    def run(*argv: object) -> Result:
        capfd.readouterr()
        code = main(["train", *map(str, argv)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No samples and no picture: each costs as much as a short run."""
    monkeypatch.setattr(cli_train, "sample", lambda *_: "")
    monkeypatch.setattr(cli_training, "draw_curve", lambda *_: None)


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One line on standard error that holds all of `parts`, nothing on standard output."""
    got, text, err = result
    assert err.startswith("lama: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in parts:
        assert part in err
    assert (got, text) == (code, "")


# --- a run from its beginning to its end


def test_train_writes_a_model_that_runs_and_beats_counting(run, cats, out, capfd):
    code, text, err = run(
        "--corpus", cats, "--out", out, "--steps", 160, "--evaluate-every", 100, *RUN_FLAGS, "-v"
    )
    assert code == 0, err
    for part in (
        "The corpus: cats.txt",
        "A window of the corpus",
        "softmax of the scores: each row sums to 1",
        "The parameters",
    ):
        assert part in text
    for part in (
        "step 40: loss ",
        "step 120: loss ",
        "step 100: held-out loss ",
        "metric",
        "n-gram (2)",
        f"lama generate -m {out}",
    ):
        assert part in text
    notes = json.loads((out / "config.json").read_text())["training"]
    losses = notes["heldout_loss_nats_per_token"]
    assert losses["trained"] < losses["bigram"] < losses["untrained"]
    assert notes["command"].startswith(
        "lama train --steps 160 --batch-size 6 --accumulation 2 --learning-rate 0.01 --dropout 0.1 "
        "--d-model 22 "
    )
    assert main(["generate", "-m", str(out), "-p", "the cat", "-n", "12", "--temperature", "0"]) == 0
    continued = capfd.readouterr().out
    assert continued.startswith("the cat") and set(continued) <= set(CATS)
    # All is there, so there is nothing to go on with, and the folder may be used again.
    code, text, err = run("--resume", out)
    assert (code, err, text.count("\n")) == (0, "", 1) and text.startswith(
        f"{out} is finished: 160 steps, held-out loss "
    )
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert_refused(
        run("--corpus", cats, "--out", out),
        2,
        f"lama: --out has earlier output of lama train, {out}. Replace it with --restart, or choose "
        f"another --out",
    )
    assert run("--corpus", "none", "--out", out, "--restart")[2].startswith(
        f"lama: replacing the run in {out}, which is at step 160 of 160\nlama: a corpus must"
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_train_exits_1_when_counting_is_better(run, bare, cats, out):
    code, text, err = run("--corpus", cats, "--out", out, "--steps", 1, *RUN_FLAGS)
    assert code == 1
    assert err.splitlines()[-1].startswith("lama: the trained model must beat the bigram baseline; got ")
    assert "Traceback" not in err and "saved in" in text and (out / "config.json").exists()


@pytest.mark.parametrize("there", [False, True])
def test_precision_bfloat16_says_where_it_is_no_faster(run, bare, cats, out, monkeypatch, there):
    kernels = importlib.import_module("lama.kernels.matmul")  # the package has a function of this name
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda device: there)
    flags = ("--steps", 1, *RUN_FLAGS, "--precision", "bfloat16")
    _, _, err = run("--corpus", cats, "--out", out, *flags)
    assert ("no instruction multiplies bfloat16 here" in err) != there


def test_standard_error_has_plain_lines_where_it_is_no_terminal(run, bare, cats, out):
    _, text, err = run("--corpus", cats, "--out", out, "--steps", 5, *RUN_FLAGS)
    assert "\r" not in text + err and "\x1b" not in text + err
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    # The speed of compiling says nothing.
    assert re.fullmatch(r"step 1 of 5: loss \d.\d{3}, rate [\d.e-]+, gradient [\d.]+", lines[0])
    assert re.fullmatch(r"step 5 of 5: .*, [\d,]+ tokens/s,( MFU \d+%,)? 00:00 left", lines[-1])
    assert len(lines) == 2  # one in ten seconds, and the last


def test_live_line_in_a_terminal_is_rewritten_now_and_then(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = LiveLine(10_000, 0)
    for step in range(1, 10_001):
        line.step(step, "loss 1.000")
    line.close()
    assert "10000/10000" in terminal.getvalue() and "loss 1.000" in terminal.getvalue()
    assert terminal.getvalue().count("\r") < 50


def test_size_says_what_it_chose_and_flags_come_before_it_and_presets_after(run, cats, out, monkeypatch):
    monkeypatch.setattr("lama.training.run.Run.measure_start", lambda run: None)
    monkeypatch.setattr(cli_training, "learn", lambda *_: 0)
    code, text, err = run(
        "shakespeare-char-cpu", "--size", "100K", "--corpus", cats, "--out", out, "--batch-size", 5
    )
    assert code == 0, err
    assert re.search(
        r"chosen for 100K parameters, 12 tokens a parameter: --n-layers \d+ --d-model \d+ --n-heads \d+ "
        r"--d-mlp \d+ --learning-rate 0.0016 --embedding-learning-rate 0 --weight-decay 0.1 "
        r"--batch-size 5 --accumulation 1 --steps \d+ --warmup 40; [\d,]+ tokens, [\d,.]+ times the text\n",
        text,
    )
    settings = RunFolder(out).settings()
    # Not the preset's.
    assert settings["d_model"] != 128 and settings["min_learning_rate"] == pytest.approx(0.00016)
    # The preset's.
    assert (settings["tokenizer"], settings["beta2"]) == ("character", 0.99)


def test_two_devices_are_named(run, bare, cats, out, monkeypatch):
    monkeypatch.setattr(cli_training, "watch", lambda *_: None)
    _, text, err = run(
        "--corpus", cats, "--out", out, "--steps", 7, *RUN_FLAGS, "--accumulation", 1, "--devices", 2
    )
    assert "Training: 7 steps of 6 x 19 tokens, shared among CPU, CPU:1\n" in text, err


@pytest.mark.parametrize("flags", [[], ["--devices", "2", "--accumulation", "1"]], ids=["one device", "two"])
def test_lama_opens_the_device_before_tinygrad_looks_for_one(flags, cats, out):
    """tinygrad on its own finds no device on a machine without clang on PATH."""
    code = """
import sys
from tinygrad import Device
def look(self): raise AssertionError("tinygrad looked for a device")
type(Device)._select_device = property(look)
from lama.cli import main
main(sys.argv[1:])
"""
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        "--corpus",
        cats,
        "--out",
        str(out),
        *RUN_FLAGS,
        "--steps",
        "2",
        *flags,
    ]
    clean = {name: value for name, value in os.environ.items() if name != "DEV"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert "looked for a device" not in done.stderr and (out / "config.json").is_file(), done.stderr


def test_corpus_comes_from_standard_input_or_a_pattern(run, cats, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_training, "learn", lambda *_: 0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(CATS.encode())))
    for i, corpus in enumerate(("-", f"{tmp_path}/*.txt")):
        code, text, err = run("--corpus", corpus, "--out", tmp_path / str(i), *RUN_FLAGS)
        assert code == 0 and "7,020 tokens for training, 780 held out" in text, err


# --- stopped, gone on with


def default_signals() -> None:
    """A job in the background ignores SIGINT, one under `nohup` SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def begin(*argv: object) -> "subprocess.Popen[bytes]":
    """A new process; Ctrl-C reaches it as it would in a terminal."""
    command = [sys.executable, "-m", "lama", "train", *map(str, argv)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default_signals
    )


def wait_for(process: "subprocess.Popen[bytes]", words: bytes) -> None:
    assert process.stderr is not None
    said = b""
    while words not in said:
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, said
        said += chunk


def assert_stopped(code: int, err: str, number: signal.Signals, steps: int, out: Path) -> int:
    """After which step."""
    (line,) = [line for line in err.splitlines() if line.startswith("lama: ")]
    found = re.fullmatch(
        rf"lama: stopped by {number.name} after step (\d+) of {steps}; resume with: lama train "
        rf"--resume {out}",
        line,
    )
    assert found, line
    assert code == 128 + number and "Traceback" not in err
    assert "stopping after this step; once more to stop at once\n" in err
    assert [path.name for path in RunFolder(out).checkpoints()] == [f"step-{int(found[1]):06d}"]
    lama.load(out)
    return int(found[1])


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(run, cats, out):
    process = begin("--corpus", cats, "--out", out, "--steps", 1_000_000, *RUN_FLAGS)
    wait_for(process, b"gradient")  # so a step is done
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    step = assert_stopped(process.returncode, err.decode(), signal.SIGINT, 1_000_000, out)
    assert_refused(
        run("--corpus", cats, "--out", out),
        2,
        f"lama: --out holds an unfinished run, {out}, at step {step} of 1000000: resume it with lama "
        f"train --resume {out}, "
        "replace it with --restart, or choose another --out",
    )


def test_sigterm_does_as_ctrl_c_and_resume_goes_on_to_the_end(run, bare, cats, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            LiveLine,
            "step",
            lambda line, step, text: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None,
        )
        code, _, err = run("--corpus", cats, "--out", out, "--steps", 3, *RUN_FLAGS)
    assert assert_stopped(code, err, signal.SIGTERM, 3, out) == 2
    code, text, err = run("--resume", out)
    assert code == 1 and err.splitlines()[-1].startswith(
        "lama: the trained model must beat the bigram baseline"
    )
    assert f"Resumed after step 2 of 3: {out}\n" in text and "step 3: held-out loss" in text
    assert [record["step"] for record in RunFolder(out).read_log() if "loss" in record] == [1, 2, 3]
    assert json.loads((out / "config.json").read_text())["training"]["command"].startswith(
        "lama train --steps 3 "
    )


def test_closed_terminal_does_as_ctrl_c(cats, out):
    """SIGHUP comes, and nothing can be written to the terminal any more."""
    child, terminal = pty.fork()
    if child == 0:
        default_signals()
        os.execv(
            sys.executable,
            [
                sys.executable,
                "-m",
                "lama",
                "train",
                "--corpus",
                cats,
                "--out",
                str(out),
                "--steps",
                "1000000",
                *RUN_FLAGS,
            ],
        )
    said = b""
    while b"compiling the training step" not in said:  # from then on a signal lets the step end
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    (checkpoint,) = RunFolder(out).checkpoints()
    assert step_of(checkpoint) == RunFolder(out).read_log()[-1]["step"]
    lama.load(out)


def test_training_under_nohup_does_not_end_with_its_terminal(run, bare, cats, out, monkeypatch):
    monkeypatch.setattr(
        LiveLine, "step", lambda line, step, text: os.kill(os.getpid(), signal.SIGHUP) if step == 2 else None
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run("--corpus", cats, "--out", out, "--steps", 3, *RUN_FLAGS)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert step_of(RunFolder(out).last_checkpoint()) == 3


def test_closed_pipe_loses_no_step(cats, out):
    process = begin("--corpus", cats, "--out", out, "--steps", 1_000_000, "--sample-every", 50, *RUN_FLAGS)
    wait_for(process, b"gradient")
    process.stdout.close()  # as after `| head`
    process.wait(timeout=120)
    assert process.returncode == 141
    (checkpoint,) = RunFolder(out).checkpoints()
    assert (
        step_of(checkpoint) >= 50
        and f"resume with: lama train --resume {out}\n" in process.stderr.read().decode()
    )


def test_sigterm_before_the_training_leaves_no_folder(run, cats, out, monkeypatch):
    kill = lambda pieces, **options: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(cli_training, "progress", kill)
    handler = signal.getsignal(signal.SIGTERM)
    assert_refused(run("--corpus", cats, "--out", out), 128 + signal.SIGTERM, "lama: terminated")
    assert not out.exists() and signal.getsignal(signal.SIGTERM) is handler


def test_tracker_that_fails_on_the_way_is_left_with_a_word(run, bare, cats, out, monkeypatch):
    def full(numbers: Any, step: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lama.training.trackers.import_tracker", lambda kind: None)
    monkeypatch.setattr(
        "lama.training.trackers.open_tracker",
        lambda *_: Tracker(full, lambda: pytest.fail("closed, though it failed")),
    )
    _, _, err = run("--corpus", cats, "--out", out, "--steps", 3, *RUN_FLAGS, "--track", "wandb")
    assert (
        err.count("lama: wandb logging failed; continuing without it: [Errno 28] No space left on device\n")
        == 1
    )
    assert [record["step"] for record in RunFolder(out).read_log() if "loss" in record] == [1, 2, 3]


# --- wrong usage


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1; got 0"),
        (["--context-length", "0"], "context_length must be at least 1; got 0"),
        (["--d-model", "30"], "d_model must be a multiple of n_heads; got d_model=30, n_heads=4"),
        (["--learning-rate", "0"], "learning_rate must be above 0; got 0.0"),
        (["--seed", "-1"], "seed must be at least 0; got -1"),
        (
            ["--tokenizer", "words"],
            "tokenizer must be bytes, character, gpt2, bpe:SIZE or a folder; got 'words'",
        ),
        (["--schedule", "cosin"], "argument --schedule: invalid choice: 'cosin'"),
        (
            ["--lerning-rate", "1"],
            "unrecognized arguments: --lerning-rate. Did you mean --learning-rate? See lama train --help",
        ),
        (
            ["--lerning-rate=1"],
            "unrecognized arguments: --lerning-rate=1. Did you mean --learning-rate? See lama train --help",
        ),
        # Nothing is abbreviated.
        (["--step", "3"], "unrecognized arguments: --step. Did you mean --steps? See lama train --help"),
        (
            ["gpt3"],
            "a preset must be gpt2, llama-char-cpu, modern-bpe, modern-char, modern-char-cpu, "
            "shakespeare-bpe, shakespeare-char, shakespeare-char-cpu, or a .toml file; got 'gpt3'. Did you",
        ),
        (["--size", "big"], "size must be a number of parameters such as 800K, 10M or 1.5B; got 'big'"),
        (["--size", "5K"], "size must leave room for the embeddings; got 5,000 parameters for 256 tokens"),
        (
            ["--size", "1M", "--from", "gpt2"],
            "a size cannot be chosen for a model to start from; got 1M parameters and --from gpt2",
        ),
        (["--devices", "CPU,ABACUS"], "got 'ABACUS' (unknown)"),
        (["--devices", "0"], "devices must be a number from 1 to 64, or names such as CPU:0,CPU:1; got 0"),
        (
            ["--devices", "CPU,CPU:0"],
            "devices must be a number, or names such as CPU:0,CPU:1, each once; got 'CPU,CPU:0'",
        ),
        (
            ["--devices", "CPU:1,CPU:2"],
            "devices must begin with the first of their kind, CPU; got 'CPU:1,CPU:2'",
        ),
        (
            ["--devices", "5"],
            "batch_size must be a multiple of devices x accumulation; got batch_size=12, 5 devices, "
            "accumulation=1",
        ),
        (["--device", "ABACUS"], "device must be one that tinygrad can open here"),
        (["--record", ""], "--record must not be empty; give some text, or leave it out"),
        (["--from", ""], "--from must not be empty; give some text, or leave it out"),
        (
            ["--record", "a", "--record-heads", ""],
            "--record-heads must not be empty; give some text, or leave it out",
        ),
        (["--size", ""], "size must be a number of parameters such as 800K, 10M or 1.5B; got ''"),
        (["--devices", ""], "devices must be a number, or names such as CPU:0,CPU:1, each once; got ''"),
        (
            ["--min-learning-rate", "0.1"],
            "min_learning_rate must be at most learning_rate; got min_learning_rate=0.1, learning_rate=0.002",
        ),
    ],
)
def test_wrong_usage_exits_2_and_leaves_no_folder(run, cats, out, argv, message):
    assert_refused(run(*argv, "--corpus", cats, "--out", out), 2, message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "a corpus must be a file, a folder, a pattern, - or one of kjv, tinyshakespeare; got "
            "{path}: No such file or directory",
        ),
        (b"", "a corpus must hold some text; got an empty file, {path}"),
        (b" \n\n ", "a corpus must hold some text; got an empty file, {path}"),
        (b"text\x00text", "a corpus must be text; got byte 0x00 at offset 4 of {path}"),
        (b"caf\xe9 text", "a corpus must be UTF-8 text; got byte 0xe9 at offset 3 of {path}"),
        (b"too short", "the training part of the corpus must be longer than context_length; got 8 tokens"),
        (
            b"too short. " * 20,
            "the held-out part of the corpus must be longer than context_length; got 22 tokens",
        ),
    ],
)
def test_corpus_that_cannot_be_used_is_refused_and_leaves_no_folder(run, out, tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    assert_refused(run("--corpus", path, "--out", out), 1, message.format(path=path))
    assert not out.exists()


def test_out_that_would_lose_something_is_refused(run, cats, tmp_path):
    assert_refused(run("--corpus", cats, "--out", cats), 2, f"--out must be a folder; got the file {cats}")
    assert_refused(
        run("--corpus", cats, "--out", tmp_path),
        2,
        "--out must be a new or empty folder",
        "has other files: cats.txt",
    )
    (tmp_path / "config.json").touch()  # some model's
    assert_refused(run("--corpus", cats, "--out", tmp_path), 2, "has other files: cats.txt, config.json")
    below = Path(cats) / "below"
    assert_refused(
        run("--corpus", cats, "--out", below), 1, f"--out must be a folder that can be written; got {below}"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_that_is_read_only_is_refused(run, cats, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    assert_refused(
        run("--corpus", cats, "--out", tmp_path / "closed" / "out"),
        1,
        "--out must be a folder that can be written",
    )


@pytest.mark.parametrize("argv", [["gpt2"], ["--out", "x"], ["--size", "1M"], ["--restart"]])
def test_resume_takes_all_from_its_folder(run, out, argv):
    assert_refused(
        run(*argv, "--resume", out),
        2,
        f"--resume cannot be combined with {argv[0]}: the run's folder has its settings",
    )


def test_default_folder_of_a_finished_run_stays_and_another_is_said(run, bare, cats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_training, "watch", lambda *_: None)
    for out in ("gpt", "gpt-2"):
        _, _, err = run("--corpus", cats, "--steps", 3, *RUN_FLAGS)
        assert ("lama: out/gpt is not changed: writing to out/gpt-2\n" in err) == (out == "gpt-2")
        (tmp_path / "out" / out / "config.json").write_text("{}")  # a model
    before = (tmp_path / "out" / "gpt" / "settings.toml").read_bytes()
    assert "seed = 5 " not in before.decode()
    run("--corpus", cats, "--steps", 3, *RUN_FLAGS, "--seed", 5, "--restart")
    assert "seed = 5 " in (tmp_path / "out" / "gpt" / "settings.toml").read_text()


def test_restart_of_an_unfinished_run_with_damaged_settings(run, bare, cats, out, monkeypatch):
    monkeypatch.setattr(
        LiveLine, "step", lambda line, step, text: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None
    )
    run("--corpus", cats, "--out", out, "--steps", 3, *RUN_FLAGS)
    (out / "settings.toml").write_text('steps = "abc"')
    assert_refused(
        run("--corpus", cats, "--out", out),
        2,
        f"--out has earlier output of lama train, {out}. Replace it with --restart",
    )
    assert run("--corpus", cats, "--out", out, "--steps", 3, *RUN_FLAGS, "--restart")[0] == 130
    (out / "lama.json").unlink()  # of an earlier version
    assert_refused(
        run("--corpus", cats, "--out", out), 2, f"--out holds an unfinished run, {out}, at step 2 of 3"
    )
    (out / "settings.toml").write_text('steps = "abc"')
    assert_refused(
        run("--corpus", cats, "--out", out, "--restart"),
        2,
        "which has other files: checkpoints, config.json",
    )


def test_resume_of_another_folder_leaves_it_as_it_was(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "settings.toml").write_text("steps = 3")
    assert_refused(run("--resume", tmp_path), 1, "no checkpoint to resume from in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "settings.toml"]


@pytest.mark.parametrize(
    "words",
    [
        ["{}"],
        ["--tokenizer", "{}"],
        ["--resume", "{}"],
        ["--from", "{}"],
        ["--out", "{}"],
        ["--corpus", "{}"],
    ],
)
def test_name_that_is_too_long_is_one_short_line(run, cats, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, text, err = run("--corpus", cats, *(word.format("a sentence " * 50) for word in words))
    assert (
        code in (1, 2) and text == "" and err.startswith("lama: ") and err.count("\n") == 1 and len(err) < 400
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cats.txt"]


def test_tracker_that_is_not_installed_is_refused_before_the_work(run, cats, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert_refused(
        run("--corpus", cats, "--out", out, "--track", "trackio"),
        1,
        "needs the package trackio",
        "Run: pip install trackio",
    )
    assert not out.exists()


def test_resume_without_a_run_is_refused(run, out):
    assert_refused(
        run("--resume", out),
        1,
        f"no run to resume in {out}: no settings.toml. Give the --out of a lama train",
    )


def test_resume_without_a_checkpoint_is_refused(run, cats, out, monkeypatch):
    monkeypatch.setattr(cli_training, "learn", lambda *_: 0)
    assert run("--corpus", cats, "--out", out, *RUN_FLAGS)[0] == 0
    assert_refused(
        run("--resume", out),
        1,
        f"no checkpoint to resume from in {out}. Start it again: lama train {out}/settings.toml",
    )


# --- the parts


def test_help_names_every_setting_and_preset(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    text, err = capsys.readouterr()
    text = re.sub(r"-\n\s+", "-", text)  # a name that was broken at the end of a line
    for name in SETTINGS:
        assert (f"--{name.replace('_', '-')} " if name != "initial" else "--from ") in text.replace(",", " ")
    for word in (
        *presets(),
        "--out",
        "--resume",
        "--restart",
        "--size",
        "--device",
        "--devices",
        "--track",
        "--verbose",
    ):
        assert word in text
    assert err == ""


def test_opening_is_a_prompt_that_the_corpus_can_spell():
    assert opening("\n\nIn the beginning\nGod created", 64) == "In the beginning\n"
    assert opening("In the beginning\n", 8) == "In t\n"
    assert opening("In the beginning", 64) == "In the beginning"
    assert opening("\n\n \n", 64) == "\n\n"


def test_table_gives_loss_bits_and_perplexity():
    losses = {"untrained": math.log(256), "n-gram (2)": 2.5, "trained": 0.6931}
    lines = [[cell.strip() for cell in line.split("|")] for line in losses_table(losses, 0.5).splitlines()]
    assert lines == [
        ["metric", "untrained", "n-gram (2)", "trained"],
        ["loss, nats per token", "5.545", "2.500", "0.693"],
        ["bits per byte", "4.000", "1.803", "0.500"],
        ["perplexity", "256.00", "12.18", "2.00"],
    ]


@pytest.mark.parametrize(
    "argv",
    [
        [
            "--steps",
            "7",
            "--seed",
            "3",
            "--corpus",
            "a b.txt",
            "*.md",
            "--bias",
            "--no-tied",
            "--learning-rate",
            "1e-05",
        ],
        ["gpt2", "--size", "10M", "--devices", "2", "--from", "lama-bytes", "--recompute"],
    ],
)
def test_command_line_trains_the_same_model_again(argv):
    args = make_parser().parse_args(["train", *argv, "-v"])
    again = make_parser().parse_args(shlex.split(command_line(args))[1:])
    assert {**vars(again), "verbose": True} == vars(args)


def test_every_setting_has_a_flag():
    args: dict[str, Any] = vars(make_parser().parse_args(["train"]))
    assert {name: args[name] for name in SETTINGS} == dict.fromkeys(SETTINGS)
