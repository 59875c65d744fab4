"""`lama classify`: batches, judgement, and the command from a file to a prediction."""

import dataclasses
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import fill
from tinygrad import Tensor

import lama
from lama.cli import main
from lama.cli.live import LiveLine
from lama.data.inputs import classifier_input
from lama.data.labelled import LabelledText, open_labelled, split_labelled
from lama.data.naive_bayes import best_naive_bayes
from lama.data.windows import epoch_order
from lama.models.bert import Bert, Classifier, ClassifierConfig
from lama.tokenizers import ByteTokenizer
from lama.training.classify import Predictor, confusion_of, evaluate, make_classifier, rows_of
from lama.training.folder import RunFolder
from lama.training.loop import Step
from lama.training.prepare import new_session
from lama.training.settings.classifier import ClassifierSettings

Lama = Callable[..., tuple[int, str, str]]
SMALL = {"d_model": 32, "n_layers": 1, "n_heads": 2, "vocabulary": 300, "batch_size": 32}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
VERBS = ("ate", "saw", "heard", "liked")


def sentences() -> list[LabelledText]:
    """Who did it is told by the order alone: counting words, or pairs of them, sees the same on both
    sides.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        a, b = rng.choice(["fox", "hen", "pig", "cow"], 2, replace=False)
        verbs = [str(verb) for verb in rng.choice(VERBS, 2)]
        found.append(LabelledText(str(a), f"{a} {verbs[0]} and {verbs[1]} {b}"))
    return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lama:
    monkeypatch.chdir(tmp_path)
    Path("animals.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in sentences()))

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["classify", *words])
        told = capfd.readouterr()
        return code, told.out, told.err

    return run


def test_every_row_comes_once_in_an_epoch_and_each_epoch_has_its_order():
    places = epoch_order(10, 4, seed=3)
    steps = [places(step) for step in range(5)]
    first, second = np.concatenate(steps)[:10], np.concatenate(steps)[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and (first != second).any()
    np.testing.assert_array_equal(steps[3], epoch_order(10, 4, seed=3)(3))
    assert len(epoch_order(3, 8, seed=0)(0)) == 8  # fewer texts than a batch


def test_rows_are_cut_and_padded_and_a_mask_in_a_text_is_text():
    model, tokenizer = make_classifier(
        ClassifierSettings(**SMALL, context_length=6), [e.text for e in sentences()], ("a", "b")
    )
    rows = rows_of(tokenizer, ["fox", "", "fox ate and liked hen and cow"], model.config)
    pad = model.config.pad
    assert rows.shape == (3, 6) and (rows[:2, 1:] == pad).all() and (rows[2] != pad).all()
    assert model.config.mask not in classifier_input(tokenizer, "[MASK]") and classifier_input(
        tokenizer, " fox\n"
    ) == classifier_input(tokenizer, "fox")


def test_context_length_is_what_most_texts_need():
    texts = ["fox ate", *["fox ate and liked hen"] * 200, "fox " * 100]
    model, tokenizer = make_classifier(ClassifierSettings(**SMALL), texts, ("a", "b"))
    assert model.config.context_length == 8 and len(classifier_input(tokenizer, texts[1])) == 5


def test_predictor_gives_the_softmax_whatever_the_batch():
    model, tokenizer = make_classifier(
        ClassifierSettings(**SMALL), [e.text for e in sentences()], ("a", "b", "c")
    )
    fill(model)
    texts = [e.text for e in sentences()[:5]]
    logits = model(Tensor(rows_of(tokenizer, texts, model.config))).numpy()
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for size in (2, 8):
        np.testing.assert_allclose(Predictor(model, tokenizer, size)(texts), chances, atol=1e-5)
    assert Predictor(model, tokenizer)([]).shape == (0, 3)


def test_judgement_by_hand():
    examples = [LabelledText(label, "") for label in "aaabbc"]
    result = confusion_of(("a", "b", "c"), examples, list("aabbab"))
    np.testing.assert_array_equal(result.confusion, [[2, 1, 0], [1, 1, 0], [0, 1, 0]])
    assert result.accuracy == 0.5
    lines = [line.split() for line in result.table().splitlines()]
    assert lines[0] == ["true", "\\", "predicted", "a", "b", "c", "recall"]
    assert lines[1] == ["a", "2", "1", "0", "66.7%"] and lines[3][-1] == "0.0%"
    assert lines[4] == ["precision", "66.7%", "33.3%", "-"]


def test_command_trains_judges_and_predicts(run: Lama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The order of the words tells the class, which naive Bayes cannot see past pairs; the encoder has
    positions.
    """
    more = (
        "--pretraining",
        "20",
        "--steps",
        "400",
        "--learning-rate",
        "5e-3",
        "--dropout",
        "0.1",
        "--word-dropout",
        "0.05",
    )
    code, out, err = run("train", "animals.tsv", "--out", "m", *FLAGS, *more)
    assert code == 0, err
    assert "untrained |    majority | naive Bayes |     trained" in out and "pretrained for 20 steps" in out
    notes = json.loads((tmp_path / "m" / "config.json").read_text())["training"]
    accuracy = notes["heldout_accuracy"]
    assert accuracy["trained"] >= 0.95 > max(accuracy["majority"], accuracy["untrained"])
    model, tokenizer = lama.load("m")
    assert isinstance(model, Classifier) and model.config.labels == ("cow", "fox", "hen", "pig")
    _, kept = split_labelled(open_labelled("animals.tsv").examples)
    assert evaluate(Predictor(model, tokenizer), kept).accuracy == accuracy["trained"]

    code, out, _ = run("eval", "m")
    assert code == 0 and f"accuracy {accuracy['trained']:.2%} of {len(kept)} texts" in out
    code, out, _ = run("predict", "m", "hen saw and heard cow")
    label, chance, text = out.rstrip("\n").split("\t")
    assert (code, label, text) == (0, "hen", "hen saw and heard cow") and float(chance) > 0.5
    monkeypatch.setattr("sys.stdin", io.StringIO("pig ate and liked fox\n\ncow ate and liked fox\n"))
    code, out, _ = run("predict", "m", "-", "--json")
    first, empty, last = out.splitlines()  # line n of the output belongs to line n of the input
    assert (code, empty) == (0, "")
    found = [json.loads(line) for line in (first, last)]
    assert [each["label"] for each in found] == ["pig", "cow"]
    assert all(sum(each["probabilities"].values()) == pytest.approx(1, abs=1e-4) for each in found)
    for words, message in (
        (["-", "pig"], "- for standard input must be the only TEXT"),
        ([" "], "TEXT must not be empty"),
    ):
        code, _, err = run("predict", "m", *words)
        assert code == 2 and message in err
    assert (
        "--out has earlier output of lama classify train, m." in run("train", "animals.tsv", "--out", "m")[2]
    )
    monkeypatch.chdir("/")  # the data are found from here, too
    assert main(["classify", "eval", str(tmp_path / "m")]) == 0
    (tmp_path / "animals.tsv").unlink()
    code, _, err = run("eval", str(tmp_path / "m"))
    assert code == 1 and f"was trained on is missing: {tmp_path / 'animals.tsv'}. Give a FILE" in err


def test_command_refuses(run: Lama, tmp_path: Path):
    lama.save(
        "bytes", Classifier(ClassifierConfig(256, 8, d_model=6, n_layers=1, n_heads=3)), ByteTokenizer()
    )
    Path("other.tsv").write_text("goat\tgoat saw hen\npig\tpig saw hen\n" * 10)
    for words, code, message in (
        (("train", "nothing"), 1, "a data set must be testament, names, shakespeare-milton or a file"),
        (("train", "animals.tsv", "--out", "animals.tsv"), 2, "--out must be a folder"),
        (("train", "animals.tsv", "--n-heads", "3"), 2, "d_model must be a multiple of n_heads"),
        (("train", "animals.tsv", "--pooling", "max"), 2, "invalid choice: 'max'"),
        (("train", "animals.tsv", "--learning-rat", "1"), 2, "Did you mean --learning-rate?"),
        (
            ("predict", "bytes", "text"),
            1,
            "the model must have a BytePairTokenizer here; got a ByteTokenizer in bytes",
        ),
        (("eval", "bytes"), 1, "the model must have a BytePairTokenizer here; got a ByteTokenizer in bytes"),
        (("predict", "lama-bpe", "text"), 1, "the model must be a classifier here; got a gpt in lama-bpe"),
    ):
        found, _, err = run(*words)
        assert found == code and message in err and err.startswith("lama: "), (words, err)


def test_a_model_that_learned_nothing_exits_with_1(run: Lama):
    code, _, err = run("train", "animals.tsv", "--out", "m", *FLAGS, "--pretraining", "0", "--steps", "1")
    assert code == 1 and "lama: the trained model must beat the" in err


def test_stopped_training_keeps_the_best_so_far(tmp_path: Path):
    (tmp_path / "data.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in sentences()))
    settings = ClassifierSettings(**SMALL, pretraining=5, steps=40, data=str(tmp_path / "data.tsv"))
    training = new_session(RunFolder(tmp_path / "out"), dataclasses.asdict(settings), "lama classify")
    steps = []
    for event in training:
        if isinstance(event, Step):
            steps.append(event.step)
            if len(steps) == 12:
                training.stop()
    assert steps == [*range(1, 6), *range(6, 13)]
    training.load_best()
    again = (training.predictor.of_rows(training.checked).argmax(-1) == training.right).mean()
    assert 1 - again == training.best < 1


@pytest.mark.parametrize(
    "words",
    [("classify", "train", "animals.tsv", *FLAGS, "--pretraining", "0"), ("bert", "animals.tsv", *FLAGS)],
)
def test_ctrl_c_ends_the_step_and_saves(
    words: tuple[str, ...], run: Lama, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def press(line: LiveLine, step: int, text: str) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LiveLine, "step", press)
    words = tuple("270" if word == "300" else word for word in words)
    assert main([*words, "--steps", "9", "--context-length", "8", "--out", "m"]) == 130
    assert "stopped by SIGINT after step 2 of 9; resume with: lama train --resume m" in capfd.readouterr().err
    model, _ = lama.load("m")
    assert isinstance(model, Classifier if words[0] == "classify" else Bert)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["names", "shakespeare-milton"])
def test_data_set_is_learned_as_well_as_naive_bayes_learns_it(name: str, tmp_path: Path):
    """Minutes each on two cores; the archives are downloaded."""
    data = open_labelled(name)
    learned, kept = split_labelled(data.examples)
    assert main(["classify", "train", name, "--out", str(tmp_path / "m")]) == 0
    model, tokenizer = lama.load(tmp_path / "m")
    assert evaluate(Predictor(model, tokenizer), kept).accuracy >= best_naive_bayes(learned).accuracy(kept)
