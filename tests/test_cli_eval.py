"""`lama eval` from the command line: what it prints, in which units, and one line for every mistake."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
from reference import random_gpt2

from lama.checkpoints import load_model, save
from lama.cli import main
from lama.evaluation import BENCHMARKS
from lama.evaluation.sliding import perplexity
from lama.evaluation.tasks import TASKS, evaluate, read_examples
from lama.tokenizers import ByteTokenizer

TEXT = "the cat sat on the mat, and the dog sat on the cat. " * 3
CONFIG = random_gpt2.make_config(vocab_size=256, n_positions=64, n_embd=18, n_layer=1, n_head=3)
ROOF = {
    "activity_label": "Roofs",
    "ctx_a": "She climbs a ladder.",
    "ctx_b": "she",
    "label": 1,
    "endings": ["sings.", "lays tiles.", "sleeps.", "eats."],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of bytes, in lama's own format."""
    folder = tmp_path_factory.mktemp("models")
    random_gpt2.write_folder(folder / "gpt2", CONFIG, random_gpt2.make_weights(CONFIG, std=0.3))
    save(folder / "tiny", load_model(folder / "gpt2"), ByteTokenizer())
    return str(folder / "tiny")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    def run(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["eval", *(["-m"] if argv and not argv[0].startswith("-") else []), *argv])
        return code, *capfd.readouterr()

    return run


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def assert_refused(result: tuple[int, str, str], code: int, message: str) -> None:
    got, out, err = result
    assert err.startswith(f"lama: {message}") and err.count("\n") == 1, err
    assert (got, out) == (code, "")


def test_perplexity_of_a_file_and_of_standard_input_is_the_librarys(run, tiny, tmp_path, monkeypatch):
    path = write(tmp_path / "text", TEXT)
    code, out, err = run(tiny, "--text", path, "--stride", "20", "--json")
    report = json.loads(out)
    expected = perplexity(load_model(tiny), ByteTokenizer(), TEXT, stride=20)
    assert code == 0 and "100%" in err and "window" in err  # a progress bar, and no text, on standard error
    assert (report["model"], report["text"], report["context_length"], report["stride"]) == (
        tiny,
        path,
        64,
        20,
    )
    assert (report["tokens"], report["bytes"]) == (len(TEXT) - 1, len(TEXT) - 1)
    assert (report["nats_per_token"], report["perplexity"]) == (expected.nats_per_token, expected.perplexity)
    assert (
        report["bits_per_token"] == report["bits_per_byte"] == pytest.approx(math.log2(report["perplexity"]))
    )
    assert report["seconds"] > 0 and report["tokens_per_s"] > 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    again = json.loads(run(tiny, "--text", "-", "--stride", "20", "--json")[1])
    assert again["perplexity"] == report["perplexity"] and again["text"] == "-"


def test_perplexity_is_printed_with_its_units(run, tiny, tmp_path):
    code, out, err = run(tiny, "--text", write(tmp_path / "text", TEXT), "--context-length", "32", "-v")
    assert code == 0 and f"lama: {tiny}: GPT, " in err and "float32 on " in err
    expected = perplexity(load_model(tiny), ByteTokenizer(), TEXT, context_length=32)
    lines = dict(
        zip(
            (line[:15].strip() for line in out.splitlines()),
            (line[16:] for line in out.splitlines()),
            strict=True,
        )
    )
    assert lines.pop("rate").endswith(" s with compilation")
    assert lines == {
        "tokens scored": "155 (155 bytes), windows of 32 moving by 16",
        "nats per token": f"{expected.nats_per_token:.4f}",
        "perplexity": f"{expected.perplexity:,.4f}",
        "bits per token": f"{expected.bits_per_token:.4f}",
        "bits per byte": f"{expected.bits_per_byte:.4f}",
    }


def test_half_precision_scores(run, tiny, tmp_path):
    code, out, _ = run(tiny, "--text", write(tmp_path / "text", TEXT), "--dtype", "float16", "--json")
    assert code == 0
    assert json.loads(out)["nats_per_token"] == pytest.approx(
        perplexity(load_model(tiny), ByteTokenizer(), TEXT).nats_per_token, rel=1e-2
    )


def test_hellaswag_is_reported_beside_the_published_figures(run, tiny, tmp_path):
    path = write(
        tmp_path / "val.jsonl", "".join(json.dumps(ROOF | {"label": i % 4}) + "\n" for i in range(5))
    )
    task = TASKS["hellaswag"]
    expected = evaluate(task, load_model(tiny), ByteTokenizer(), read_examples(task, Path(path), limit=4))
    code, out, err = run(tiny, "--task", "hellaswag", "--data", path, "--limit", "4")
    assert code == 0 and "16/16" in err
    assert expected.metrics["acc"] == 0.25  # one and the same answer, right once
    for part in (
        "hellaswag: 4 examples, ",
        "acc             25.00 % ± 25.00",
        "acc_norm        25.00 %",
        f"protocol: {task.protocol}",
    ):
        assert part in out
    for part in (
        "124M     355M     774M    1558M",
        "[1] acc_norm, %         31.14        -        -    50.89",
        "github.com/karpathy/llm.c",
    ):
        assert part in out


def test_lambada_is_reported_as_json(run, tiny, tmp_path):
    long = {"text": "and so it was that nobody in the house had ever heard of the old man who answered"}
    path = write(
        tmp_path / "test.jsonl", json.dumps({"text": "she called and he answered"}) + "\n" + json.dumps(long)
    )
    code, out, _ = run(tiny, "--task", "lambada", "--data", path, "--json")
    report = json.loads(out)
    task = TASKS["lambada"]
    expected = evaluate(task, load_model(tiny), ByteTokenizer(), read_examples(task, Path(path)))
    assert (code, report["task"], report["examples"], report["cut"]) == (0, "lambada", 2, 1)
    assert (report["acc"], report["perplexity"]) == (expected.metrics["acc"], expected.metrics["perplexity"])
    assert report["published"][0]["same_protocol"] and report["published"][0]["acc"]["124M"] == 32.56
    assert (
        "2 examples, 1 of them cut on the left to fit the context"
        in run(tiny, "--task", "lambada", "--data", path)[1]
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give one of --text FILE, --task TASK with --data FILE"),
        (["--text", "x", "--task", "lambada", "--data", "x"], "give one of --text FILE"),
        (["--task", "lambada"], "--task and --data must be given together"),
        (["--text", "x", "--data", "x"], "--task and --data must be given together"),
        (
            ["--text", "x", "--limit", "3"],
            "--limit must be given with --task or --harness; got --limit 3 without it",
        ),
        (
            ["--task", "lambada", "--data", "x", "--stride", "3"],
            "--stride must be given with --text; got --stride 3 without it",
        ),
        (["--task", "mmlu", "--data", "x"], "argument --task: invalid choice: 'mmlu'"),
        (["--text", "x", "--device", "ABACUS"], "device must be one that tinygrad can open here"),
    ],
)
def test_wrong_usage_exits_2(run, argv, message):
    assert_refused(run("nowhere", *argv), 2, message)


def test_windows_that_cannot_be_exit_2(run, tiny, tmp_path):
    path = write(tmp_path / "text", TEXT)
    assert_refused(
        run(tiny, "--text", path, "--stride", "65"),
        2,
        "stride must be at least 1 and at most context_length=64; got 65",
    )
    assert_refused(
        run(tiny, "--text", path, "--context-length", "65"),
        2,
        "context_length must be at least 2 and at most the model's 64",
    )
    data = write(tmp_path / "data", json.dumps({"text": "a b"}))
    too_long = run(tiny, "--task", "lambada", "--data", data, "--context-length", "65")
    assert_refused(too_long, 2, "context_length must be at least 1 and at most the model's 64; got 65")
    assert_refused(
        run(tiny, "--task", "lambada", "--data", data, "--limit", "0"), 2, "limit must be at least 1; got 0"
    )


def test_input_that_cannot_be_used_is_named_before_a_model_is_looked_for(run, tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    for path, message in (
        (
            str(tmp_path / "none"),
            "a corpus must be a file, a folder, a pattern, - or one of kjv, tinyshakespeare; got {path}: No "
            "such file or directory",
        ),
        (write(tmp_path / "empty", ""), "a corpus must hold some text; got an empty file, {path}"),
        (str(tmp_path / "latin"), "a corpus must be UTF-8 text; got byte 0xe9 at offset 3 of {path}"),
    ):
        assert_refused(run("nowhere", "--text", path), 1, message.format(path=path))
    data = write(tmp_path / "data", "{\n")
    got = "Expecting property name enclosed in double quotes at line 1, column 2"
    message = f"line 1 of {data} must be valid JSON; got {got}"
    assert_refused(run("nowhere", "--task", "hellaswag", "--data", data), 1, message)


def test_model_that_is_not_there_is_named(run, tmp_path):
    path = write(tmp_path / "text", TEXT)
    assert_refused(run(str(tmp_path / "none"), "--text", path), 1, "model must be ")


def test_choices_are_the_tasks_there_are():
    assert set(BENCHMARKS) == TASKS.keys()
