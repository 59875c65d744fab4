"""`lama train --chat`: a model learns what an assistant says, and can be resumed, talked to and exported."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_chat import chat_model, chat_tokenizer
from test_runs import outcome, until
from tinygrad import Tensor

import lama
from lama.cli import main
from lama.data import open_tokens
from lama.data.packing import PackedRows
from lama.models.gpt import GPT, GPTConfig
from lama.models.registry import n_parameters
from lama.tokenizers import train_bpe
from lama.tokenizers.chat_template import template_of
from lama.training.chat import prompts
from lama.training.folder import RunFolder
from lama.training.prepare import new_session, resumed_run

ROWS = [{"prompt": f"{'ab'[i % 2]}{i}", "completion": "no"} for i in range(40)]
FLAGS = "--context-length 64 --batch-size 4 --learning-rate 1e-2 --epochs 12 --sample-every 1000"
Train = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, with a chat template, bare/, without one, and data.jsonl."""
    here = tmp_path_factory.mktemp("chat")
    model = GPT(chat_model().config)
    lama.save(here / "model", model, chat_tokenizer(here / "t"))
    lama.save(here / "bare", model, chat_tokenizer(here / "u", None))
    (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return here


@pytest.fixture
def train(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Train:
    """lama train in `here`, with --out in the test's own folder; its exit code, output and errors."""
    monkeypatch.chdir(here)
    monkeypatch.setattr("lama.cli.conversations.ANSWER_TOKENS", 5)

    def train(*flags: str, chat: str = "data.jsonl", start: str = "model") -> tuple[int, str, str]:
        chosen = [*(["--chat", chat] if chat else []), *(["--from", start] if start else [])]
        code = main(["train", *chosen, "--out", str(tmp_path / "out"), *FLAGS.split(), *flags])
        return code, *capfd.readouterr()

    return train


def test_a_model_learns_to_answer(train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    code, out, err = train()
    assert code == 0, err
    assert "36 for training, 108 tokens of the assistant\n4 held out, 12 tokens of the assistant\n" in out
    assert re.search(r"an epoch is \d+ rows of 64 tokens, \d+% full", out)
    assert "wanted  'no<|im_end|>'\nanswer  'no'\n" in out and f"lama chat -m {tmp_path / 'out'}\n" in out
    folder = RunFolder(tmp_path / "out")
    losses = [record["validation_loss"] for record in folder.read_log() if "validation_loss" in record]
    start = folder.read_log()[0]["untrained"]
    assert len(losses) == 4 and losses[-1] < 0.7 * start
    # The folder has the template, and so has its export.
    model, tokenizer = lama.load(tmp_path / "out")
    assert "<|im_start|>" in template_of(tokenizer).source
    assert main(["export", "-m", str(tmp_path / "out"), str(tmp_path / "hf")]) == 0
    assert "<|im_start|>" in template_of(lama.load(tmp_path / "hf")[1]).source
    said = lama.chat(model, tokenizer, [{"role": "user", "content": "a2"}], temperature=0, max_new_tokens=9)
    assert str(said) == "no" and said.finish_reason == "stop"


def test_the_loss_is_that_of_the_answers_alone(here: Path, tmp_path: Path):
    settings = {"initial": str(here / "model"), "chat": [str(here / "data.jsonl")], "context_length": 64}
    run = new_session(RunFolder(tmp_path / "out"), settings, "")
    assert (run.config.epochs, run.config.batch_size, run.config.learning_rate) == (1, 4, 1e-4)
    tokens = open_tokens(tmp_path / "out" / "data")
    ends, logits = tokens.ends["validation"], []
    total = count = 0
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        ids = tokens.validation[begin:end].astype(np.int32)
        logits = run.model(Tensor(ids[None, :-1])).numpy()[0]
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= logits.max(-1, keepdims=True)
        counted = tokens.counted["validation"][begin + 1 : end] > 0
        total -= log_p[np.arange(len(ids) - 1), ids[1:]][counted].sum()
        count += counted.sum()
    assert run.measure()["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(here / "model", tmp_path / "model")
    shutil.copy(here / "data.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {
        "initial": "model",
        "chat": ["data.jsonl"],
        "context_length": 64,
        "epochs": 3,
        "batch_size": 2,
    }
    settings |= {"dropout": 0.1, "accumulation": 2}
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    for folder, step in ((whole, 0), (parts, 4)):
        run = new_session(folder, settings, "")
        run.measure_start()
        until(run, step)
    assert run.step == 4 < run.config.steps
    shutil.rmtree("model")
    Path("data.jsonl").unlink()
    list(resumed_run(parts, {}))
    log, files = outcome(parts)
    expected_log, expected = outcome(whole)
    assert log == expected_log
    assert all(files[name] == content for name, content in expected.items())
    # Other conversations are refused.
    Path("data.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(lama.LamaError, match=r"must read the text it began with; got data\.jsonl, which has"):
        resumed_run(parts, {})


def test_packing_and_padding_learn_the_same_in_an_epoch(here: Path, tmp_path: Path):
    shared = {"initial": str(here / "model"), "chat": [str(here / "data.jsonl")], "context_length": 64}
    runs = [
        new_session(RunFolder(tmp_path / str(packing)), {**shared, "packing": packing, "epochs": 2}, "")
        for packing in (True, False)
    ]
    assert runs[0].config.steps < runs[1].config.steps == 18
    assert runs[0].measure() == pytest.approx(runs[1].measure(), rel=1e-5)


def test_a_model_without_a_template_learns_with_one_that_is_given(train: Train, tmp_path: Path):
    code, _, err = train(start="bare")
    assert (
        code == 1
        and "the model must have a chat template to train on messages; got none for line 1 of" in err
    )
    code, _out, err = train("--template", "plain", start="bare")
    assert code == 0, err
    _model, tokenizer = lama.load(tmp_path / "out")
    assert "<|im_start|>" in template_of(tokenizer).source


@pytest.mark.parametrize(
    ("flags", "options", "code", "message"),
    [
        (
            [],
            {"start": ""},
            2,
            "chat needs a model to fine-tune; got none. Add --from smollm2",
        ),
        (["--corpus", "data.jsonl"], {}, 2, "chat and corpus must not be given together"),
        ([], {"chat": ""}, 2, "epochs must be given with chat; got 12 without it"),
        (["--steps", "3"], {}, 2, "--steps and --epochs must not be given together"),
        ([], {"chat": "none.jsonl"}, 1, "none.jsonl: No such file or directory"),
        (["--chat-held-out", "none.jsonl"], {}, 1, "none.jsonl: No such file or directory"),
        (["--template", "none.jinja"], {}, 1, "none.jinja cannot be read: No such file or directory"),
        (["--context-length", "7"], {}, 1, "there must be training conversations and held-out ones"),
    ],
)
def test_what_does_not_fit_is_one_line(
    train: Train, tmp_path: Path, flags: list[str], options: dict[str, str], code: int, message: str
):
    got, _, err = train(*flags, **options)
    assert got == code and re.fullmatch(f"lama: .*{re.escape(message)}.*\n", err), err
    assert not (tmp_path / "out").exists()


def test_rows_of_a_step_are_a_function_of_seed_and_step(here: Path, tmp_path: Path):
    settings = {"initial": str(here / "model"), "chat": [str(here / "data.jsonl")], "context_length": 64}
    run = new_session(RunFolder(tmp_path / "out"), settings, "")
    tokens = open_tokens(tmp_path / "out" / "data")
    rows = PackedRows(tokens.train, tokens.ends["train"], tokens.counted["train"], 64, seed=0)
    for step in (9, 2):
        for ours, expected in zip(run.trainer.batches(step), rows.batches(4)(step), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_a_quantised_file_is_widened_and_a_line_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    tokenizer = train_bpe("Why? Because. " * 9, 261)
    lama.save(tmp_path / "m", GPT(GPTConfig(261, 64, d_model=32, n_layers=1, n_heads=2)), tokenizer)
    file = tmp_path / "m.gguf"
    assert main(["export", "-m", str(tmp_path / "m"), "--to", "gguf", str(file), "--dtype", "int8"]) == 0
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"text": "Why? " * n}) + "\n" for n in range(2, 9))
    )
    settings = {"initial": str(file), "chat": [str(tmp_path / "data.jsonl")]}
    run = new_session(RunFolder(tmp_path / "out"), settings, "")
    size = 4 * n_parameters(run.model)
    wanted = f"m.gguf has Q8_0 weights, which are converted to float32 for training: {size:,} bytes\n"
    assert wanted in capfd.readouterr().err and run.model.embed.weight.dtype.name == "float"


def test_held_out_conversations_of_a_file_and_texts(here: Path, tmp_path: Path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "once"}) + "\n" + json.dumps(ROWS[0]) + "\n")
    settings = {"initial": str(here / "model"), "chat": [str(here / "data.jsonl")], "context_length": 64}
    run = new_session(
        RunFolder(tmp_path / "out"), settings | {"chat_held_out": [str(tmp_path / "held.jsonl")]}, ""
    )
    assert {part: len(ends) for part, ends in run.tokens.ends.items()} == {"train": 40, "validation": 2}
    decode = run.tokenizer.decode
    assert [(decode(asked), decode(said)) for asked, said in prompts(run.tokens, 9)] == [
        ("o", "nce<|im_end|>"),
        ("<|im_start|>user\na0<|im_end|>\n<|im_start|>assistant\n", "no<|im_end|>"),
    ]
