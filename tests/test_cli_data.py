"""`lama data`: tokens that are written once and that runs of `lama train` read where they are."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import CATS, RUN
from test_runs import outcome, until

import lama
from lama.cli import main
from lama.data import open_tokens
from lama.training.folder import RunFolder
from lama.training.prepare import new_session, resumed_run

ROWS = [f"row {i} says the cat sat on the mat." for i in range(200)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("cats.txt").write_text(CATS)
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    return tmp_path


def data(*words: str) -> int:
    return main(["data", *words])


def test_tokens_are_written_once_and_trained_on_with_their_tokenizer(here: Path, capfd):
    assert data("cats.txt", "rows.jsonl", "--out", "tokens", "--tokenizer", "bpe:280") == 0
    out = capfd.readouterr().out
    assert re.search(r"cats\.txt and rows\.jsonl: \d\.\d MB in .* MB/s; [\d,]+ tokens for training", out)
    tokens = open_tokens(here / "tokens")
    shared = {"corpus": ["tokens"], "steps": 6, "evaluate_every": 3, "warmup": 2, **RUN}
    shared |= {"separate": True, "mixture": ["1", "3"]}
    whole, parts = RunFolder(here / "whole"), RunFolder(here / "parts")
    for folder, step in ((whole, 0), (parts, 3)):
        run = new_session(folder, shared, "")
        run.measure_start()
        until(run, step)
    assert run.tokens.digest == tokens.digest and run.tokenizer.vocab_size == 280
    assert [path.name for path in (here / "whole" / "data").iterdir()] == ["meta.json"]
    inputs, targets, starts = run.trainer.batches(0)
    assert inputs.shape == targets.shape == starts.shape == (6, 19) and starts.any()
    list(resumed_run(parts, {}))
    (log, files), (expected_log, expected) = outcome(parts), outcome(whole)
    assert log == expected_log and all(files[name] == content for name, content in expected.items())
    # Other tokens in their place are refused.
    assert data("rows.jsonl", "cats.txt", "--out", "tokens", "--tokenizer", "bpe:280") == 0
    with pytest.raises(
        lama.LamaError, match="tokens must hold the tokens that the run began with; got others"
    ):
        resumed_run(parts, {})


def test_tokens_of_another_tokenizer_and_damaged_ones_are_refused(here: Path, capfd):
    assert data("cats.txt", "--out", "tokens", "--tokenizer", "bytes") == 0
    shared = {"corpus": ["tokens"], "steps": 2, **RUN}
    for given, message in (
        (
            {"tokenizer": "gpt2"},
            r"another tokenizer than the model's; got vocabularies of 256 and 50,257 tokens",
        ),
        ({"tokenizer": "bpe:300"}, r"a tokenised corpus must keep its tokenizer; got bpe:300"),
        ({"mixture": ["1", "2"]}, r"mixture must have a number for each corpus; got 2 for 1"),
        ({"mixture": ["none"]}, r"mixture must be numbers above 0; got 'none'"),
        ({"context_length": 7999}, r"the training part of the corpus must be longer than context_length"),
    ):
        with pytest.raises(lama.LamaError, match=message):
            new_session(RunFolder(here / "out"), {**shared, **given}, "")
    with pytest.raises(lama.LamaError, match=r"must be text here; got tokens of lama data in tokens"):
        new_session(RunFolder(here / "out"), {**shared, "corpus": ["tokens", "cats.txt"]}, "")
    content = (here / "tokens" / "train.bin").read_bytes()
    (here / "tokens" / "train.bin").write_bytes(content[::-1])
    with pytest.raises(lama.LamaError, match=r"train\.bin must have SHA-256"):
        new_session(RunFolder(here / "out"), shared, "")
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["none.txt", "--out", "x"], 1, "none.txt: No such file or directory"),
        (["cats.txt", "--out", "cats.txt"], 2, "--out must be a folder; got the file cats.txt"),
        (["cats.txt", "--out", "x", "--workers", "0"], 2, "--workers must be at least 1; got 0"),
        (["cats.txt", "--out", "x", "--validation", "1"], 2, "--validation must be a share between 0 and 1"),
        (["cats.txt", "--out", "x", "--tokenizer", "bpe:1"], 2, "got 1"),
        (["cats.txt", "--out", "x", "--tokenizer", "nothing"], 1, "nothing"),
    ],
)
def test_what_is_wrong_is_one_line(here: Path, capfd, words: list[str], code: int, message: str):
    assert data(*words) == code
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("lama: ") and message in err[-1] and not (here / "x").exists()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_a_killed_command_continues(here: Path, capfd):
    """Its processes end with it, and the next call uses what they have encoded."""
    Path("large.jsonl").write_text("".join(json.dumps({"text": text * 400}) + "\n" for text in ROWS * 3))
    words = ["large.jsonl", "--out", "tokens", "--workers", "2"]
    command = [sys.executable, "-m", "lama", "data", *words]
    with subprocess.Popen(command, start_new_session=True) as process:
        while process.poll() is None and len(list(here.glob("tokens/.shards/*.npz"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = {path.name: path.stat().st_mtime_ns for path in here.glob("tokens/.shards/*.npz")}
    if process.returncode == 0:
        pytest.skip("it was faster than the signal")
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process stayed")
    assert len(kept) >= 2
    assert data(*words) == 0 and not (here / "tokens" / ".shards").exists()
    assert data("large.jsonl", "--out", "again", "--workers", "1") == 0
    assert open_tokens(here / "tokens", verify=True).digest == open_tokens(here / "again").digest
