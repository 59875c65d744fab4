"""DPO: the loss and its gradient are the formula's, a run learns preferences, and resumes exactly."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_adapters import LLAMA, model_of
from test_chat import CHATML, chat_model, chat_tokenizer
from test_runs import until
from tinygrad import Tensor

import lama
from lama.cli import main
from lama.data import open_corpus
from lama.data.conversations import encode_pair, pair_of, write_conversations
from lama.data.packing import PackedPairs
from lama.errors import LamaError, UsageError
from lama.models.adapters import remove_adapter, trained_parameters
from lama.models.gpt import GPT
from lama.tokenizers.chat_template import ChatTemplate, template_of
from lama.training.folder import RunFolder
from lama.training.loop import Step
from lama.training.loss import TokenLoss, language_model_loss
from lama.training.preferences import PreferenceRun, preference_loss
from lama.training.prepare import new_session, resumed_run
from lama.training.replica import Replica
from lama.training.settings.base import TrainingConfig

BETA, LENGTHS = 0.3, (9, 6)  # of chosen and rejected conversations; few, as each is compiled
ROWS = [{"prompt": f"{'ab'[i % 2]}{i}", "chosen": "yes", "rejected": "no"} for i in range(24)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("adapter", [True, False])
def test_loss_and_gradient_are_the_formulas(adapter: bool, monkeypatch: pytest.MonkeyPatch):
    """-log σ(β (Δ - Δ_ref)), and -β σ(-β (Δ - Δ_ref)) (∇ log p(chosen) - ∇ log p(rejected))."""
    rng, n = np.random.default_rng(0), 5
    model = model_of(replace(LLAMA, context_length=32, n_layers=1))
    if not adapter:
        remove_adapter(model)
    ids = rng.integers(1, 37, n * sum(LENGTHS)).astype(np.uint8)
    ends, counted = np.cumsum(LENGTHS * n), (rng.random(len(ids)) < 0.6).astype(np.uint8)
    # Each conversation alone, in numpy (float64).
    parameters = trained_parameters(model)
    sides, ratios = [], np.zeros(n)
    for side, length in enumerate(LENGTHS):
        places = ends[side::2, None] - length + np.arange(length)
        inputs, targets = ids[places[:, :-1]].astype(np.int32), ids[places[:, 1:]].astype(np.int32)
        counts = counted[places[:, 1:]].astype(float) * (1, -1)[side]
        log_p = log_softmax(model(Tensor(inputs)).numpy().astype(float))
        ratios += (np.take_along_axis(log_p, targets[..., None], -1)[..., 0] * counts).sum(1)
        sides.append((inputs, targets, counts))
    reference = ratios + rng.normal(0, 2, n)
    margins = BETA * (ratios - reference)
    wanted = dict.fromkeys(parameters, 0.0)
    for inputs, targets, counts in sides:
        factors = BETA / (1 + np.exp(margins))[:, None] * counts * inputs.size / n
        arrays = (Tensor(inputs), Tensor(targets), None, Tensor(factors.astype(np.float32)))
        gradients = language_model_loss(model, *arrays).gradient(*parameters.values())
        Tensor.realize(*gradients)
        wanted = {name: wanted[name] + g.numpy() for name, g in zip(parameters, gradients, strict=True)}
    # The pairs packed in rows, in two parts of a batch, with few logits at a time.
    packed = PackedPairs(ids, ends, counted, 32, 3)
    rows = packed.epoch(0)
    assert packed.most == 2 and sorted(map(len, rows)) == [1, 2, 2]
    rows = [*rows, []]
    of_rows = np.zeros((4, 2), np.float32)
    for row, found in zip(rows, of_rows, strict=True):
        found[: len(row)] = reference[row]
    arrays = (*packed.arrays(rows), of_rows)
    loss = TokenLoss(partial(preference_loss, beta=BETA))
    expected = np.logaddexp(0, -margins).mean()
    monkeypatch.setattr("lama.training.recompute.LOGITS", 37 * 20)
    for recompute in (False,) if adapter else (True, False):
        replica = Replica(model, TrainingConfig(recompute=recompute), loss, 2)
        parts = ([array[2 * i : 2 * i + 2] for array in arrays] for i in range(2))
        losses = [replica.add(i, np.zeros(2, np.uint32), part) for i, part in enumerate(parts)]
        assert np.mean(losses) == pytest.approx(expected, rel=1e-5)
        for name, gradient in replica.gradients.items():
            most = np.abs(wanted[name]).max()
            np.testing.assert_allclose(gradient.numpy(), wanted[name], atol=2e-5 * most + 1e-8)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, with a chat template, and pairs.jsonl."""
    here = tmp_path_factory.mktemp("pairs")
    lama.save(here / "model", GPT(chat_model(n_layers=1).config), chat_tokenizer(here / "t"))
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return here


SETTINGS: dict[str, object] = {"initial": "model", "chat": ["pairs.jsonl"], "dpo": 0.5, "context_length": 64}
SETTINGS |= {"batch_size": 4, "learning_rate": 1e-2}


def test_a_model_learns_to_prefer(here: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(here)
    monkeypatch.setattr("lama.cli.conversations.ANSWER_TOKENS", 3)
    flags = ["--dpo", "0.5", "--context-length", "64", "--batch-size", "4", "--learning-rate", "1e-2"]
    flags += ["--epochs", "4"]
    words = ["train", "--from", "model", "--chat", "pairs.jsonl", "--out", str(tmp_path / "out"), *flags]
    assert main([*words, "--sample-every", "1000"]) == 0
    out = capfd.readouterr().out
    assert "22 pairs for training" in out and "2 pairs held out" in out
    assert "held-out loss 0.6931 of a pair" in out and "wanted  'yes<|im_end|>'" in out
    assert re.search(r"held-out loss 0\.\d+, accuracy 100\.0%, reward margin \d", out)
    log = RunFolder(tmp_path / "out").read_log()
    assert log[0]["untrained"] == pytest.approx(np.log(2)) and log[1]["loss"] == pytest.approx(np.log(2))
    last = log[-1]
    assert last["accuracy"] == 1 and last["margin"] > 0.5 and last["validation_loss"] < 0.5


def test_reference_rounds_as_training_does(here: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(here)
    run = new_session(RunFolder(tmp_path / "out"), {**SETTINGS, "precision": "bfloat16"}, "")
    step = next(iter(run))
    assert isinstance(step, Step) and step.loss == pytest.approx(np.log(2), abs=1e-6)


WHOLE = pytest.param({}, id="whole", marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [WHOLE, pytest.param({"lora": 3}, id="lora")])
def test_a_resumed_run_has_the_same_bits_and_reference(
    more: dict[str, object], here: Path, tmp_path, monkeypatch
):
    shutil.copytree(here / "model", tmp_path / "model")
    shutil.copy(here / "pairs.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    whole, parts = RunFolder(Path("whole")), RunFolder(Path("parts"))
    for folder, step in ((whole, 0), (parts, 3)):
        run = new_session(folder, {**SETTINGS, **more, "epochs": 3, "accumulation": 2}, "")
        run.measure_start()
        until(run, step)
    assert run.step == 3 < run.config.steps
    with pytest.raises(UsageError, match="settings it began with; got evaluation_tokens was 10000 and is 64"):
        resumed_run(parts, {"evaluation_tokens": 64})
    again = resumed_run(parts, {})
    assert isinstance(again, PreferenceRun) and again.has_reference
    assert again.reference["train"].numpy().all()
    list(again)
    assert outcome(parts) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora", "3"]], ids=["whole", "lora"])
def test_two_processes_train_to_the_bits_of_one(more: list[str], here: Path, tmp_path: Path):
    pytest.importorskip("mpi4py")
    words = ["--from", here / "model", "--chat", here / "pairs.jsonl", "--dpo", "0.5", "--epochs", "3", *more]
    words += ["--context-length", "64", "--batch-size", "4", "--accumulation", "2", "--learning-rate", "1e-2"]
    for n in "12":
        command = [sys.executable, "-m", "lama", "train", *words, "--processes", n, "--out", tmp_path / n]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert outcome(RunFolder(tmp_path / "2")) == outcome(RunFolder(tmp_path / "1"))


def outcome(folder: RunFolder) -> tuple[list[float], list[bytes]]:
    """The losses, and all weights and states."""
    losses = [record.get("loss", record.get("validation_loss")) for record in folder.read_log()[1:]]
    return losses, [path.read_bytes() for path in sorted(folder.path.rglob("*.safetensors"))]


def test_forms_of_pairs():
    user, yes = {"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}
    no = {"role": "assistant", "content": "no"}
    for row in (
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": [user], "chosen": "yes", "rejected": [no]},
        {"chosen": [user, yes], "rejected": [user, no]},
        {"prompt": "a", "chosen": [user, yes], "rejected": [user, no], "messages": [user, yes]},
    ):
        assert pair_of(row, "here") == [[user, yes], [user, no]]


def test_what_counts_is_the_answer_in_which_they_differ(tmp_path: Path):
    tokenizer = chat_tokenizer(tmp_path / "t", CHATML)
    turns = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    sides = encode_pair(
        {"prompt": turns, "chosen": "no more", "rejected": "none"},
        "here",
        tokenizer,
        template_of(tokenizer),
        400,
    )
    texts = [tokenizer.decode(side.ids[side.counted > 0].tolist()) for side in sides]
    assert texts == ["no more<|im_end|>", "none<|im_end|>"]
    assert sides[0].place == sides[1].place


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "here must have chosen and rejected for --dpo; got prompt",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "must be texts or messages; got .* in here"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "for --dpo; got prompt, rejected$"),
        ({"chosen": "b", "rejected": "c"}, "got assistant at the beginning in here"),
    ],
)
def test_pairs_that_are_wrong_have_their_line(row: dict[str, object], message: str):
    with pytest.raises(LamaError, match=message) as caught:
        pair_of(row, "here")
    assert "\n" not in str(caught.value)


def test_an_answer_that_begins_the_other_is_learned(tmp_path: Path):
    tokenizer = chat_tokenizer(tmp_path / "t")
    each = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}"
    no_ends = ChatTemplate(each + "{% if add_generation_prompt %}a:{% endif %}")

    def learned(template: ChatTemplate, **row: object) -> list[str]:
        sides = encode_pair({"prompt": "q", **row}, "here", tokenizer, template, 400)
        return [tokenizer.decode(side.ids[side.counted > 0].tolist()) for side in sides]

    turns = [{"role": role, "content": "yes"} for role in ("assistant", "user", "assistant")]
    ends = ChatTemplate(CHATML)
    assert learned(no_ends, chosen="yes", rejected="yes no") == ["yes", "yes no"]
    assert learned(ends, chosen="yes", rejected="yes no") == ["yes<|im_end|>", "yes no<|im_end|>"]
    for same in ({"chosen": "yes", "rejected": "yes"}, {"chosen": "yes", "rejected": turns}):
        assert learned(no_ends, **same) == learned(ends, **same) == ["", ""]


def test_pairs_are_dropped_for_a_reason(tmp_path: Path):
    texts = [("yes", "no"), ("yes", "yes"), ("y" * 50 + "es", "y" * 50 + "o")]
    rows = [{"prompt": "?", "chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = chat_tokenizer(tmp_path / "t")
    corpus = open_corpus([str(tmp_path / "pairs.jsonl")], read=False)
    (tmp_path / "data").mkdir()
    where = corpus, None, tokenizer, template_of(tokenizer), tmp_path / "data"
    message = "of 3 in .*, 1 without a token of the assistant in 41, 1 without two different answers"
    with pytest.raises(LamaError, match=message):
        write_conversations(*where, 81, 0.1, pairs=True)


def test_prompts_that_differ_are_refused(tmp_path: Path):
    tokenizer, answer = chat_tokenizer(tmp_path / "t"), {"role": "assistant", "content": "b"}
    row = {name: [{"role": "user", "content": name}, answer] for name in ("chosen", "rejected")}
    with pytest.raises(LamaError, match="must follow the same prompt; got other prompts in here"):
        encode_pair(row, "here", tokenizer, template_of(tokenizer), 400)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dpo 0.1", "dpo must be given with chat; got 0.1 without it"),
        ("--chat pairs.jsonl", "to learn from pairs"),
        ("--chat pairs.jsonl --dpo 0.1 --label-smoothing 0.1", "label_smoothing must be 0 with dpo; got 0.1"),
        ("--chat pairs.jsonl --dpo pairs.jsonl", "invalid float value: 'pairs.jsonl'"),
    ],
)
def test_what_does_not_fit_is_one_line(
    flags: str, message: str, here: Path, tmp_path: Path, monkeypatch, capfd
):
    monkeypatch.chdir(here)
    (here / "pairs.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": row["prompt"]}) + "\n" for row in ROWS)
    )
    words = ["train", "--from", "model", "--out", str(tmp_path / "out"), *flags.split()]
    try:
        code = main(words)
    except SystemExit as error:
        code = int(error.code or 0)
    err = capfd.readouterr().err
    assert code in (1, 2) and message in err.splitlines()[-1], err
    assert not (tmp_path / "out").exists()
