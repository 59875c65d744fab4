"""`lama train --from MODEL`: a model that is there learns another text, with its own shape and its own
tokenizer.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import losses_until
from reference import random_gpt2
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

import lama
from lama.cli import main
from lama.data import batch, open_tokens
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import CharacterTokenizer, huggingface_files, train_bpe
from lama.training.folder import RunFolder
from lama.training.loss import cross_entropy
from lama.training.prepare import new_session, resumed_run

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
VOCAB, UNUSED = 280, 3  # the model's vocabulary is larger than its tokenizer's, as padded ones are
CHARACTERS = CharacterTokenizer("".join(sorted(set(TEXT))))
LAMA = GPTConfig(
    CHARACTERS.vocab_size,
    19,
    d_model=22,
    n_layers=1,
    n_heads=2,
    d_mlp=37,
    bias=False,
    tied=False,
    activation="relu",
)
FLAGS = [
    "--steps",
    "30",
    "--warmup",
    "5",
    "--batch-size",
    "4",
    "--learning-rate",
    "1e-2",
    "--sample-every",
    "1000",
]
Train = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, gpt2/ as Hugging Face has it, with a BPE of its own, and lama/ with a tokenizer of
    characters.
    """
    here = tmp_path_factory.mktemp("finetune")
    (here / "text.txt").write_text(TEXT)
    config = random_gpt2.make_config(
        vocab_size=VOCAB + UNUSED, n_positions=17, n_embd=22, n_layer=1, n_head=2
    )
    random_gpt2.write_folder(here / "gpt2", config, random_gpt2.make_weights(config, std=0.3))
    for name, content in huggingface_files(train_bpe(TEXT, VOCAB)).items():
        (here / "gpt2" / name).write_bytes(content)
    lama.save(here / "lama", GPT(LAMA), CHARACTERS)
    return here


@pytest.fixture
def train(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Train:
    """lama train in the folder of the models, with --out in the test's own; its exit code and standard
    error.
    """
    monkeypatch.chdir(here)
    monkeypatch.setattr("lama.cli.train.SAMPLE_TOKENS", 2)  # each length of a prompt is a function to compile

    def train(*flags: str, corpus: str = "text.txt") -> tuple[int, str]:
        code = main(["train", *flags, "--corpus", corpus, "--out", str(tmp_path / "out"), *FLAGS])
        return code, capfd.readouterr().err

    return train


def check_what_it_learned(model: Path, out: Path, context_length: int) -> None:
    """It began as the model was, its loss fell, and the folder has its shape, its tokenizer, and other
    weights.
    """
    (before, tokenizer), (after, saved) = lama.load(model), lama.load(out)
    assert after.config == before.config
    assert saved.encode(TEXT) == tokenizer.encode(TEXT)
    assert all(
        (p.numpy() != get_state_dict(before)[name].numpy()).any() for name, p in get_state_dict(after).items()
    )
    losses = [record["loss"] for record in RunFolder(out).read_log() if "loss" in record]
    inputs, targets = batch(open_tokens(out / "data").train, 0, 0, 4, context_length)
    assert losses[0] == pytest.approx(cross_entropy(before(Tensor(inputs)), Tensor(targets)).item(), abs=1e-4)
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.5


def test_gpt2_folder_learns_a_text(
    train: Train, here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    code, err = train("--from", "gpt2")
    assert code == 0, err
    check_what_it_learned(here / "gpt2", tmp_path / "out", context_length=17)
    assert (
        main(["generate", "-m", str(tmp_path / "out"), "-p", "the quick", "-n", "3", "--temperature", "0"])
        == 0
    )
    text = capfd.readouterr().out
    assert text.startswith("the quick") and len(text) > len("the quick\n")


def test_lama_folder_learns_in_windows_shorter_than_its_context(train: Train, here: Path, tmp_path: Path):
    # Of the preset, not its shape and tokenizer.
    code, err = train("shakespeare-char-cpu", "--from", "lama", "--context-length", "7")
    assert code == 0, err
    check_what_it_learned(here / "lama", tmp_path / "out", context_length=7)


def test_resumed_fine_tuning_needs_no_more_of_the_model_it_began_with(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And goes on exactly as if it had not ended."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here / "lama", "model")
    settings = {
        "initial": "model",
        "corpus": [str(here / "text.txt")],
        "context_length": 7,
        "steps": 6,
        "batch_size": 4,
    }

    whole = losses_until(new_session(RunFolder(Path("whole")), settings, ""), 6)
    first = losses_until(new_session(RunFolder(Path("parts")), settings, ""), 3)
    shutil.rmtree("model")
    assert first + losses_until(resumed_run(RunFolder(Path("parts")), {}), 6) == whole
    for name, p in get_state_dict(lama.load("whole/checkpoints/step-000006")[0]).items():
        np.testing.assert_array_equal(
            p.numpy(), get_state_dict(lama.load("parts/checkpoints/step-000006")[0])[name].numpy(), name
        )


def assert_refused(result: tuple[int, str], code: int, message: str, out: Path) -> None:
    """One line on standard error, and nothing written."""
    got, err = result
    assert re.fullmatch(f"lama: .*{re.escape(message)}.*\n", err), err
    assert got == code and not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--d-model 24", "d_model must be the model's own with --from, 22; got 24. Leave it out"),
        ("--n-layers 2", "n_layers must be the model's own with --from, 1; got 2. Leave it out"),
        ("--no-bias", "bias must be the model's own with --from, True; got False. Leave it out"),
        (
            "--positions sinusoidal",
            "positions must be the model's own with --from, learned; got sinusoidal. Leave it out",
        ),
        (
            "--tokenizer bytes",
            "the tokenizer must be the model's own with --from; got --tokenizer bytes. Leave it out",
        ),
        ("--context-length 18", "context_length must be at most the model's, 17; got 18"),
        ("--size 1M", "a size cannot be chosen for a model to start from"),
    ],
)
def test_shape_that_is_not_the_models_is_refused(flags: str, message: str, train: Train, tmp_path: Path):
    assert_refused(train("--from", "gpt2", *flags.split()), 2, message, tmp_path / "out")


def test_shape_that_is_the_models_may_be_said(here: Path, tmp_path: Path):
    shape = {name: getattr(LAMA, name) for name in ("d_model", "n_layers", "bias", "tied", "activation")}
    settings = {"initial": str(here / "lama"), "corpus": [str(here / "text.txt")], **shape}
    run = new_session(RunFolder(tmp_path / "out"), settings, "")
    assert run.config.context_length == LAMA.context_length and run.config.d_mlp == LAMA.d_mlp


@pytest.mark.parametrize(("given", "rate"), [({}, 1e-4), ({"learning_rate": 3e-5}, 3e-5)])
def test_learning_rate_of_a_model_that_is_trained_on_is_low_unless_it_is_given(
    given, rate, here: Path, tmp_path: Path
):
    settings = {"initial": str(here / "lama"), "corpus": [str(here / "text.txt")], **given}
    run = new_session(RunFolder(tmp_path / "out"), settings, "")
    assert run.config.learning_rate == rate and run.config.min_learning_rate == pytest.approx(rate / 10)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('context_length = "7"', "context_length must be of type int; got '7'"),
        ("initial = 3", "initial must be of type str; got 3"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(
    setting: str, message: str, train: Train, here: Path, tmp_path: Path
):
    file = tmp_path / "settings.toml"
    file.write_text(setting if setting.startswith("initial") else f'initial = "gpt2"\n{setting}\n')
    assert_refused(train(str(file)), 2, message, tmp_path / "out")


def edited(source: Path, target: Path, **changes: Any) -> str:
    """A copy of a model's folder whose config.json says something else."""
    shutil.copytree(source, target)
    fields = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(fields | changes))
    return str(target)


def test_vocabulary_that_does_not_fit_the_model_is_refused(train: Train, here: Path, tmp_path: Path):
    model = edited(
        here / "lama",
        tmp_path / "more",
        tokenizer=CharacterTokenizer("".join(sorted({*TEXT, "É", "é"}))).to_json(),
    )
    (tmp_path / "other.txt").write_text(TEXT + "É")
    sizes = f"vocab_size={LAMA.vocab_size}, and the tokenizer has {LAMA.vocab_size + 2} tokens"
    message = f"the text must be made of the model's tokens; got 'É', id {LAMA.vocab_size} ({sizes})"
    code, err = train("--from", model, corpus=str(tmp_path / "other.txt"))
    assert (
        code == 1
        and err.splitlines()[-1] == f"lama: {message}"
        and not (tmp_path / "out" / "settings.toml").exists()
    )
    assert "is larger than the model" in err.splitlines()[0]
    model = edited(here / "gpt2", tmp_path / "fewer", vocab_size=VOCAB - 1)
    assert_refused(
        train("--from", model), 1, "wrong shape: wte.weight (283, 22) instead of (279, 22)", tmp_path / "out"
    )
    model = edited(here / "gpt2", tmp_path / "none")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "none" / name).unlink(missing_ok=True)
    assert_refused(
        train("--from", model),
        1,
        "a model must have its tokenizer beside it; got no tokenizer.json",
        tmp_path / "out",
    )


def test_text_that_the_models_tokenizer_cannot_spell_is_refused(train: Train, tmp_path: Path):
    text = tmp_path / "other.txt"
    text.write_text(TEXT + "À la carte")
    assert_refused(train("--from", "lama", corpus=str(text)), 1, "'À'", tmp_path / "out")
