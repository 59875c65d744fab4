"""Sessions of every model: stopped and resumed, they come to the same end as if they had never stopped."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import CATS, steps_until

import lama
from lama.cli import main
from lama.cli import training as cli_training
from lama.cli.live import LiveLine
from lama.errors import LamaError, UsageError
from lama.training.folder import RunFolder
from lama.training.loop import Step
from lama.training.prepare import new_session, resumed_run
from lama.training.session import Evaluation, Session

SMALL = {"d_model": 8, "n_layers": 1, "n_heads": 2, "batch_size": 8, "warmup": 2, "dropout": 0.1}
SETTINGS: dict[str, dict[str, object]] = {
    "bert": {"steps": 8, "evaluate_every": 3, "vocabulary": 270, "context_length": 8, "heldout_windows": 20},
    "seq2seq": {"steps": 8, "evaluate_every": 3, "average": 3, "tokenizer": "characters"},
    "classifier": {"steps": 6, "pretraining": 5, "evaluate_every": 2, "vocabulary": 270},
}
STOPS = {"bert": (2, 6), "seq2seq": (6, 7), "classifier": (3, 5, 9)}
"""Steps after which a training is stopped: around evaluations, and at the end of a stage."""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Session]:
    """Begin a training of a model in a folder."""
    (tmp_path / "cats.txt").write_text(CATS)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), 5)) for _ in range(60)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{text}\t{text[::-1]}\n" for text in dict.fromkeys(texts)))
    (tmp_path / "labels.tsv").write_text("".join(f"{text[0]}\tsay {text} now\n" for text in texts))
    data: dict[str, dict[str, object]] = {
        "bert": {"corpus": [str(tmp_path / "cats.txt")]},
        "seq2seq": {"task": str(tmp_path / "pairs.tsv")},
        "classifier": {"data": str(tmp_path / "labels.tsv")},
    }

    def start(model: str, name: str = "out", **changes: object) -> Session:
        settings = {"model": model, **SMALL, **SETTINGS[model], **data[model], **changes}
        session = new_session(RunFolder(tmp_path / name), settings, "lama train ...")
        session.measure_start()
        return session

    return start


def until(session: Session, step: int | None = None) -> list[int]:
    """Iterate, and stop after `step`; the steps."""
    return [each.step for each in steps_until(session, step)]


def outcome(folder: RunFolder) -> tuple[list[dict[str, object]], dict[str, bytes]]:
    """The log without timings, and the weights of the model and of the last checkpoint."""
    timed = ("tokens_per_second", "mfu", "seconds", "peak_flops", "config", "command")
    log = [
        {name: value for name, value in record.items() if name not in timed} for record in folder.read_log()
    ]
    last = folder.last_checkpoint()
    files = (folder.path / "model.safetensors", last / "model.safetensors", last / "training.safetensors")
    return log, {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


GO_ON = """
import sys
from lama.training.loop import Step
from lama.training.folder import RunFolder
from lama.training.prepare import resumed_run
session = resumed_run(RunFolder(sys.argv[1]), {})
for event in session:
    if isinstance(event, Step) and str(event.step) == sys.argv[2]:
        session.stop()
"""


@pytest.mark.parametrize("model", SETTINGS)
def test_resumed_training_comes_to_the_same_end_bit_for_bit(start, model):
    """In new processes, which have compiled and captured nothing."""
    whole, parts = start(model, "whole/out"), start(model)
    steps = until(whole)
    assert steps == list(range(1, whole.config.total_steps + 1)) and whole.finished
    until(parts, STOPS[model][0])
    for step in (*STOPS[model][1:], 0):
        assert parts.folder.checkpoints()[-1].name != f"step-{step:06d}"
        subprocess.run([sys.executable, "-c", GO_ON, str(parts.folder.path), str(step)], check=True)
    (log, files), (expected_log, expected_files) = outcome(parts.folder), outcome(whole.folder)
    assert log == expected_log
    for name, content in expected_files.items():
        where = name.replace("whole/", "")
        assert files[where] == content, name
    assert resumed_run(parts.folder, {}).finished


@pytest.mark.parametrize("model", SETTINGS)
def test_training_resumes_where_the_process_was_killed(start, model, tmp_path):
    whole, killed = start(model, "whole/out"), start(model)
    until(whole)
    for event in killed:  # it ends between two steps, with a checkpoint behind it
        if isinstance(event, Step) and event.step == killed.config.total_steps - 1:
            break
    assert killed.folder.checkpoints()
    until(resumed_run(killed.folder, {}))
    assert outcome(killed.folder) == outcome(whole.folder)


def test_best_classifier_is_kept_and_its_notes_say_so(start):
    session = start("classifier", steps=8, evaluate_every=1)
    shares = iter([0.2, 0.9, 0.5, 0.9, 0.1, 0.2, 0.3, 0.4])
    session.measure = lambda: {"validation_loss": 1.0, "accuracy": next(shares)}
    found = [event for event in session if isinstance(event, Evaluation)]
    assert [event.best for event in found] == [True, True, *[False] * 6]
    assert [event.step for event in found] == list(range(6, 14))
    notes = json.loads((session.folder.path / "config.json").read_text())["training"]
    assert notes["steps"] == 7 and notes["data"].endswith("labels.tsv")


@pytest.mark.parametrize(
    ("model", "damage", "message"),
    [
        ("bert", "data/train.bin", "train.bin must have .* bytes"),
        ("seq2seq", "data/rows.json", "rows.json must be valid JSON"),
        ("classifier", "data/rows.json", "rows.json must be valid JSON"),
    ],
)
def test_resume_with_damaged_data_is_refused(start, model, damage, message):
    session = start(model)
    until(session, 1)
    (session.folder.path / damage).write_text("x")
    with pytest.raises(LamaError, match=message):
        resumed_run(session.folder, {})


def test_resume_with_other_rows_or_settings_is_refused(start):
    session, other = start("seq2seq"), start("seq2seq", "other", held_out=0.3)
    until(session, 1)
    with pytest.raises(UsageError, match="must have the settings it began with; got d_model was 8 and is 16"):
        resumed_run(session.folder, {"d_model": 16})
    (other.folder.data / "rows.json").rename(session.folder.data / "rows.json")
    with pytest.raises(LamaError, match="must read the data it began with"):
        resumed_run(session.folder, {})


# --- the command line


def command(model: str, tmp_path: Path) -> list[str]:
    """Short trainings by the names that the commands had before `lama train --model`."""
    (tmp_path / "cats.txt").write_text(CATS)
    (tmp_path / "labels.tsv").write_text("".join(f"{'ab'[i % 2]}\tsay {i} {i % 2}\n" for i in range(40)))
    small = ["--d-model", "8", "--n-layers", "1", "--n-heads", "2", "--steps", "4", "--batch-size", "4"]
    first = {
        "bert": ["bert", "cats.txt", "--vocabulary", "270", "--context-length", "8"],
        "seq2seq": ["seq2seq", "tiny"],
        "classifier": ["classify", "train", "labels.tsv", "--vocabulary", "270", "--pretraining", "2"],
    }
    return [*first[model], *small, "--out", "out"]


@pytest.mark.parametrize(
    ("model", "number"), list(zip(SETTINGS, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), strict=True))
)
def test_signal_ends_the_step_saves_and_says_how_to_go_on(model, number, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_training, "draw_curve", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr("lama.cli.live._forget_terminal", lambda: None)
        patch.setattr(
            LiveLine, "step", lambda line, step, text: os.kill(os.getpid(), number) if step == 3 else None
        )
        assert main(command(model, tmp_path)) == 128 + number
    steps = 6 if model == "classifier" else 4
    said = f"lama: stopped by {number.name} after step 3 of {steps}; resume with: lama train --resume out\n"
    assert said in capfd.readouterr().err
    lama.load("out")
    assert main(command(model, tmp_path)) == 2
    assert "--out holds an unfinished run, out, at step 3 of" in capfd.readouterr().err
    assert main(["train", "--resume", "out"]) in (0, 1)  # so short a training may have learned nothing
    told = capfd.readouterr()
    assert (
        f"Resumed after step 3 of {steps}: out\n" in told.out and "metric" in told.out
    ) or "held-out" in told.out
    assert main(["train", "--resume", "out"]) == 0
    assert re.match(rf"out is finished: {steps} steps, .*\. Nothing is left to do\n", capfd.readouterr().out)


@pytest.mark.parametrize("model", SETTINGS)
def test_train_with_a_model_is_the_same_command(model, tmp_path, monkeypatch, capfd):
    """The same bits, and a settings.toml from which it can be trained again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_training, "draw_curve", lambda *_: None)
    words = command(model, tmp_path)
    assert main(words) in (0, 1)
    rest = words[words.index("--d-model") : -1]
    named = {
        "bert": ["--corpus", "cats.txt", "--vocabulary", "270", "--context-length", "8"],
        "seq2seq": ["tiny"],
        "classifier": ["labels.tsv", "--vocabulary", "270", "--pretraining", "2"],
    }
    assert main(["train", "--model", model, *named[model], *rest, "second"]) in (0, 1)
    assert main(["train", "out/settings.toml", "--out", "third"]) in (0, 1)
    capfd.readouterr()
    first = Path("out/model.safetensors").read_bytes()
    assert (
        Path("second/model.safetensors").read_bytes() == Path("third/model.safetensors").read_bytes() == first
    )
    again = json.loads(Path("out/config.json").read_text())["training"]["command"]
    assert again.startswith("lama train ") and f"--model {model}" in again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "bert", "--sample-every", "3"], "--sample-every is a setting of gpt; got --model bert"),
        (["--model", "bert", "--from", "gpt2"], "--from is a setting of gpt; got --model bert"),
        (["--average", "3"], "--average is a setting of seq2seq; got --model gpt"),
        (
            ["--model", "classifier", "--held-out", "0"],
            "--held-out is a setting of seq2seq; got --model classifier",
        ),
        (["--model", "seq2seq", "--size", "1M"], "--size and --depth are for a GPT; got --model seq2seq"),
        (["--model", "bert", "gpt2"], "a preset must be"),
        (["--model", "seq2seq", "copi"], "a task must be copy, .*; got 'copi'. Did you mean copy?"),
        (["--model", "seq2seq"], "a task must be copy, .*; got ''"),
        (["--model", "classifier"], "a data set must be testament, .*; got ''"),
        (["--model", "seq2seq", "copy", "--recompute"], "recompute must be off for --model seq2seq"),
        (["--model", "gpt3"], "invalid choice: 'gpt3'"),
        (["--model", "seq2seq", "file.toml"], "--model must be that of the settings, bert; got seq2seq"),
        (["bad.toml"], "model must be one of gpt, bert, seq2seq, classifier; got 'llama'"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("file.toml").write_text('model = "bert"\n')
    Path("bad.toml").write_text('model = "llama"\n')
    before = sorted(tmp_path.iterdir())
    assert main(["train", *words]) in (1, 2)
    error = capfd.readouterr().err
    assert (
        error.startswith("lama: ")
        and error.count("\n") == 1
        and re.search(message.replace("?", r"\?"), error)
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_of_another_kind_is_one_line_in_every_form(capfd):
    forms = (["lama-bpe", "text"], ["-m", "lama-bpe", "text"], ["text", "--model", "lama-bpe"])
    for form in (*forms, ["text", "--model=lama-bpe"]):
        assert main(["fill", *form]) == 1
        assert capfd.readouterr().err == "lama: the model must be a bert here; got a gpt in lama-bpe\n"
