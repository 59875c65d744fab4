"""`lama seq2seq` and `lama translate`: pairs learned by heart, saved, and answered exactly by a new
process.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lama
from lama.cli import main
from lama.data.tasks import TASKS
from lama.training.settings.pairs import PRESETS

FAST = [
    "--steps",
    "160",
    "--d-model",
    "32",
    "--n-layers",
    "1",
    "--n-heads",
    "2",
    "--learning-rate",
    "5e-3",
    "--warmup",
    "10",
]


def new_process(*arguments: str, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(Path(lama.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-m", "lama", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out, printed = tmp_path_factory.mktemp("seq2seq") / "tiny", io.StringIO()
    stdout, sys.stdout = sys.stdout, printed
    try:
        assert main(["seq2seq", "tiny", "--out", str(out), *FAST]) == 0
    finally:
        sys.stdout = stdout
    return out, printed.getvalue()


def test_training_prints_the_three_columns_and_keeps_its_notes(trained):
    out, printed = trained
    files = sorted(path.name for path in out.iterdir() if path.name != "loss.png")
    assert files == [
        "checkpoints",
        "config.json",
        "data",
        "held-out.tsv",
        "lama.json",
        "log.jsonl",
        "model.safetensors",
        "settings.toml",
    ]
    assert "metric                |  untrained |   baseline |    trained" in printed
    assert "exact match           |       0.0% |      14.3% |     100.0%" in printed
    assert f"lama seq2seq check -m {out}" in printed
    notes = json.loads((out / "config.json").read_text())["training"]
    assert notes["exact"]["trained"] == 1 and notes["settings"]["d_model"] == 32 and notes["steps"] == 160


def test_new_process_answers_exactly_in_all_ways(trained):
    """Saved and loaded, with the true target before it, on true prefixes, and token by token on its own
    output: 7 of 7.
    """
    out, _ = trained
    done = new_process("seq2seq", "check", str(out))
    assert done.returncode == 0, done.stderr
    table = {
        line.split("|")[0].strip(): [cell.strip() for cell in line.split("|")[1:]]
        for line in done.stdout.splitlines()
        if "|" in line
    }
    for way in ("exact: teacher-forced", "on true prefixes", "on its own output"):
        assert table[way] == ["0.0%", "100.0%"]
    untrained, loss = (float(cell) for cell in table["loss, nats per token"])
    assert untrained > 3 and loss < 0.02
    assert "The train to Hamburg is late. -> Der Zug nach Hamburg hat Verspätung.\n" in done.stdout


def test_translation_of_lines_and_of_a_text(trained, capsys, monkeypatch):
    out, _ = trained
    pairs = TASKS["tiny"].make()
    lines = "".join(f"{source}\n" for source, _ in pairs)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["translate", str(out), "-"]) == 0
    assert capsys.readouterr().out.splitlines() == [target for _, target in pairs]
    # Line n of the output belongs to line n of the input.
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"\n{pairs[1][0]}\n \n"))
    assert main(["translate", str(out), "-"]) == 0
    assert capsys.readouterr().out == f"\n{pairs[1][1]}\n\n"
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"{pairs[1][0]}\n\U0001f642\n{pairs[2][0]}\n{'a ' * 500}\n")
    )
    assert main(["translate", str(out), "-"]) == 1  # and no good answer is lost
    told = capsys.readouterr()
    assert told.out == f"{pairs[1][1]}\n\n{pairs[2][1]}\n\n"
    assert [line[:14] for line in told.err.splitlines()] == ["lama: line 2: ", "lama: line 4: "]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{pairs[1][0]}\n"))
    assert main(["translate", str(out), "-", "--beam", "2", "-v"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["translate", str(out), pairs[0][0], "--beam", "2", "-v"]) == 0
    scores = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert scores[0][1] == pairs[0][1] and float(scores[0][0]) > float(scores[1][0])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["seq2seq", "revers"],
            2,
            r"a task must be copy, .*, or a file of pairs; got 'revers'\. Did you mean reverse\?",
        ),
        (["seq2seq", "tiny", "DIR"], 2, "only check takes a folder after the task; got DIR"),
        (["seq2seq", "check"], 2, "check must be given the folder of a model, and no settings"),
        (
            ["seq2seq", "check", "nowhere"],
            2,
            "check must be given a folder of lama seq2seq; got nowhere, which is not a folder",
        ),
        (
            ["seq2seq", "tiny", "--tokenizer", "words"],
            2,
            "--tokenizer and --held-out are for files; the task tiny has its own",
        ),
        (
            ["seq2seq", "tiny", "--n-heads", "5", "--out", "new"],
            2,
            "d_model must be a multiple of n_heads; got d_model=64, n_heads=5",
        ),
        (["seq2seq", "tiny", "--step", "5"], 2, "Did you mean --steps?"),
        (["translate", "nowhere", ""], 2, "TEXT must not be empty"),
        (["translate", "nowhere", "a", "--beam", "0"], 2, "beam must be at least 1"),
    ],
)
def test_wrong_usage_is_one_line(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("lama: ") and error.count("\n") == 1
    assert re.search(message, error) or message in error
    assert list(tmp_path.iterdir()) == []


def test_text_of_other_characters_is_one_line(trained, capsys):
    assert main(["translate", str(trained[0]), "Ω"]) == 1
    assert "text must be made of characters that the model has seen; got 'Ω'" in capsys.readouterr().err


def test_commands_for_a_gpt_refuse_it(trained, capsys):
    assert main(["generate", "-m", str(trained[0]), "-p", "a"]) == 1
    assert "the model must be a gpt here; got a transformer in" in capsys.readouterr().err


def test_folder_of_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["seq2seq", "tiny", "--out", str(tmp_path)]) == 2
    assert "--out must be a new or empty folder; got" in capsys.readouterr().err


def test_model_is_replaced_only_when_asked_to(trained, capsys):
    before = {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()}
    assert main(["seq2seq", "tiny", "--out", str(trained[0]), "--steps", "1"]) == 2
    assert (
        f"--out has earlier output of lama seq2seq, {trained[0]}. Replace it with --restart"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (5, "training in .*config.json must be an object; got 5"),
        ({"task": [1]}, r"task in .*config.json must be a text; got \[1\]"),
        ({"settings": "x"}, "settings in .*config.json must be an object; got 'x'"),
        ({"settings": {"seed": 1.5}}, "seed in .*config.json must be a whole number; got 1.5"),
    ],
)
def test_check_of_a_folder_with_odd_notes_is_one_line(trained, tmp_path, capsys, notes, message):
    shutil.copytree(trained[0], tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"training": notes}))
    assert main(["seq2seq", "check", str(tmp_path / "odd")]) == 1
    assert re.fullmatch(f"lama: {message}\n", capsys.readouterr().err)


def test_check_of_pairs_that_are_too_long_is_one_line(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "long")
    (tmp_path / "long" / "held-out.tsv").write_text("a " * 2000 + "\tb\n")
    assert main(["seq2seq", "check", str(tmp_path / "long")]) == 1
    assert "pairs must fit context_length; got 4001 tokens" in capsys.readouterr().err


def test_model_that_is_no_better_is_a_failure(tmp_path, capsys):
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{i}\t{(i * 7919) % 97}\n" for i in range(60)))
    assert (
        main(
            [
                "seq2seq",
                str(file),
                "--out",
                str(tmp_path / "out"),
                "--steps",
                "1",
                "--d-model",
                "8",
                "--n-layers",
                "1",
            ]
        )
        == 1
    )
    captured = capsys.readouterr()
    assert "the trained model must beat the untrained one and the baseline; got 0.0% exact" in captured.err
    assert "60 pairs" not in captured.out and " held out\n" in captured.out


def test_interrupt_ends_the_step_and_keeps_the_model(tmp_path):
    command = [
        sys.executable,
        "-m",
        "lama",
        "seq2seq",
        "tiny",
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "100000",
        "--d-model",
        "8",
    ]
    env = os.environ | {"PYTHONPATH": str(Path(lama.__file__).parent.parent)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "stopped by SIGINT after step" in error and (tmp_path / "out" / "model.safetensors").exists()


def test_help_names_the_tasks_and_needs_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["seq2seq", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*PRESETS, "characters", "words"))


# --- the whole budgets


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_task_is_learned_to_its_threshold(task, tmp_path):
    """Exact on unseen pairs, in a new process, and looking where the answer stands."""
    out = str(tmp_path / task)
    done = new_process("seq2seq", task, "--out", out)
    assert done.returncode == 0, done.stderr
    done = new_process("seq2seq", "check", out)
    assert done.returncode == 0, done.stdout + done.stderr
