"""`lama train --record`: what heads look at is kept moment by moment, and the training is the same as
without.
"""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from helpers import CATS, RUN, RUN_FLAGS

from lama.checkpoints import load
from lama.cli import main
from lama.errors import LamaError, UsageError
from lama.interp.attention import attention_of, moment_panels
from lama.training.folder import RunFolder
from lama.training.loop import Step
from lama.training.prepare import new_session, resumed_run
from lama.training.recording import read_recording
from lama.training.run import Run

SENTENCE = "the cat sat."
RECORD = {"record": SENTENCE, "record_every": 3, "record_heads": ("0.1", "0.0")}


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "cats.txt"
    path.write_text(CATS)
    return path


def start(folder: Path, cats: Path, **changes) -> Run:
    settings = {"corpus": [str(cats)], "steps": 7, "evaluate_every": 4, "warmup": 2, **RUN, **changes}
    run = new_session(RunFolder(folder), settings, "lama train ...")
    run.measure_start()
    return run


@pytest.fixture(scope="module")
def whole(cats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    list(start(folder, cats, **RECORD))
    return RunFolder(folder)


def test_recording_has_the_untrained_model_every_so_many_steps_and_the_end(whole):
    found = read_recording(whole.recording_file)
    losses = {record["step"]: record["loss"] for record in whole.read_log() if "loss" in record}
    assert (found.text, found.tokens, found.heads) == (SENTENCE, list(SENTENCE.encode()), ["0.1", "0.0"])
    assert found.steps == [0, 3, 6, 7] and found.losses == [None, losses[3], losses[6], losses[7]]
    assert found.patterns.shape == (4, 2, 12, 12) and not np.triu(found.patterns, 1).any()
    np.testing.assert_allclose(found.patterns.sum(-1), 1, atol=12 / 65535)
    assert np.diff(found.patterns, axis=0).any((1, 2, 3)).all()  # it learns: no two moments are alike


def test_recording_is_what_the_model_of_that_step_does(whole):
    model, tokenizer = load(whole.last_checkpoint())
    patterns = attention_of(model, tokenizer, tokenizer.encode(SENTENCE))["self"].patterns[0]
    np.testing.assert_allclose(read_recording(whole.recording_file).patterns[-1], patterns[[1, 0]], atol=1e-4)


def test_recording_changes_nothing_in_the_training(whole, cats, tmp_path):
    run = start(tmp_path / "out", cats)
    list(run)
    assert not run.folder.recording_file.exists()
    for name in ("model.safetensors", "checkpoints/step-000007/training.safetensors"):
        assert (whole.path / name).read_bytes() == (run.folder.path / name).read_bytes()


def test_resumed_recording_is_the_one_that_never_ended(whole, cats, tmp_path):
    run = start(tmp_path / "out", cats, **RECORD)
    for event in run:
        if isinstance(event, Step) and event.step == 5:
            run.stop()
    with open(run.folder.recording_file, "a") as file:
        # Of a process that was killed later.
        file.write('{"step": 6, "loss": 9, "weights": "AA"}\n{"step": 7, "lo')
    list(resumed_run(run.folder, {}))
    assert run.folder.recording_file.read_bytes() == whole.recording_file.read_bytes()


def test_recording_that_was_deleted_goes_on_from_there(cats, tmp_path):
    run = start(tmp_path / "out", cats, **RECORD)
    for event in run:
        if isinstance(event, Step) and event.step == 5:
            run.stop()
    run.folder.recording_file.unlink()
    list(resumed_run(run.folder, {}))
    assert read_recording(run.folder.recording_file).steps == [6, 7]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"record": "the cat sat on the mat"},
            LamaError,
            "the text must fit context_length; got 22 tokens, context_length=19. Shorten it",
        ),
        (
            {"record_heads": ["0.2"]},
            UsageError,
            "record_heads must be LAYER.HEAD of the model's 1 x 2, counted from 0; got '0.2'. Choose "
            "0.0 to 0.1",
        ),
        ({"record_heads": ["first"]}, UsageError, "counted from 0; got 'first'. Choose 0.0 to 0.1"),
        (
            {"record": ""},
            UsageError,
            "record_heads and record_every must be given with record; got no sentence. Add --record TEXT",
        ),
    ],
)
def test_recording_that_cannot_be_is_refused_and_leaves_no_folder(cats, tmp_path, changes, error, message):
    with pytest.raises(error, match=f"{re.escape(message)}$"):
        start(tmp_path / "out", cats, **RECORD | changes)
    assert not (tmp_path / "out").exists()


def test_moments_of_a_recording_are_a_row_for_each_head_from_the_first_step_to_the_last(whole):
    found = read_recording(whole.recording_file)
    steps = [0, 3, 6, 7, 9, 11, 13]
    rows = moment_panels(found.patterns[[0, 1, 2, 3, 3, 2, 1]], steps, found.heads, ["x"] * 12)
    assert [panel.title for panel in rows[1]] == [f"head 0.0, step {step}" for step in (0, 6, 7, 9, 13)]
    np.testing.assert_array_equal(rows[0][4].values, found.patterns[1, 0])
    assert len(rows) == 2 and len(moment_panels(found.patterns[:1], [0], found.heads, ["x"] * 12)[0]) == 1


def test_train_writes_the_page_and_attention_writes_it_again(cats, tmp_path, capfd):
    out, page = tmp_path / "out", tmp_path / "page.html"
    words = [
        "--corpus",
        str(cats),
        "--steps",
        "4",
        "--record",
        SENTENCE,
        "--record-heads",
        "0.1",
        "0.0",
        *RUN_FLAGS,
    ]
    main(["train", *words, "--out", str(out)])  # too short a run to beat the bigrams
    assert f"5 moments of 2 heads are in {out / 'attention.html'}" in capfd.readouterr().out
    assert main(["attention", "-m", str(out), "--recorded", "--out", str(page)]) == 0
    assert page.read_bytes() == (out / "attention.html").read_bytes()
    if importlib.util.find_spec("matplotlib") is not None:
        assert main(["attention", "-m", str(out), "--recorded", "--out", str(tmp_path / "moments.png")]) == 0
        assert (tmp_path / "moments.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        (
            ["--recorded"],
            "--recorded must be given with --out FILE, and without TEXT, --target, --kind, --layer and "
            "--head",
        ),
        (
            ["a text", "--recorded", "--out", str(page)],
            "--recorded must be given with --out FILE, and without TEXT",
        ),
        (["--recorded", "--out", "page.gif"], "--out must end in .html or .png or .svg; got page.gif"),
    ):
        assert main(["attention", "-m", str(out), *arguments]) == 2
        assert message in capfd.readouterr().err
    assert main(["attention", "-m", str(tmp_path), "--recorded", "--out", str(page)]) == 1
    assert "does not exist. Give the folder of a lama train --record" in capfd.readouterr().err
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: the page is not looked at in a browser")
    with Browser() as browser:
        browser.open(page)
        loss = read_recording(RunFolder(out).recording_file).losses[-1]
        assert browser.text(".player b") == f"step 4, loss {loss:.3f}"
        browser.run("document.querySelector('.player input').focus()")
        browser.key("ArrowLeft")
        assert browser.text(".player b").startswith("step 3, loss ")
        assert browser.run("return document.querySelectorAll('.frames canvas').length") == 2
        assert (
            browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            == 0
        )
        assert browser.complaints == []
