"""Masked language modelling: what is chosen, what is seen, the baselines, and that a BERT learns."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import fill
from tinygrad import Tensor

import lama
from lama.cli import main
from lama.cli.bert import filled_in
from lama.data.masked import MASK, PAD, mask_tokens, special_ids
from lama.errors import LamaError
from lama.generation.fill_mask import fill_in
from lama.models.bert import Bert, BertConfig
from lama.tokenizers import train_bpe
from lama.training.folder import RunFolder
from lama.training.loop import Step, Trainer
from lama.training.masked import (
    MaskedEvaluator,
    counting_baselines,
    heldout_masked,
    masked_loss,
    masked_windows,
)
from lama.training.prepare import new_session
from lama.training.settings.base import TrainingConfig
from lama.training.settings.bert import BertSettings

SMALL = BertConfig(
    11, 13, d_model=6, n_layers=1, n_heads=3, segments=0, pad=3, mask=5, norm="pre", norm_epsilon=1e-5
)
# The third word follows from the second and the fourth together, from neither alone.
TEXT = "".join(
    f"{a} {b} {'even' if (i + j) % 2 else 'odd'} {c}.\n"
    for i, (a, b) in enumerate([("the", "cat"), ("my", "dog")] * 100)
    for j, c in enumerate(("sat", "ran"))
)
FLAGS = [
    "--vocabulary",
    "275",
    "--context-length",
    "16",
    "--d-model",
    "48",
    "--n-layers",
    "1",
    "--n-heads",
    "4",
    "--weight-decay",
    "0",
]


def test_shares_are_those_of_the_paper():
    rows = np.random.default_rng(0).integers(10, 500, (400, 100)).astype(np.int32)
    rows[:, 90:] = 0
    seen, positions, targets = mask_tokens(
        rows, np.random.default_rng(1), mask=1, vocab_size=500, special=(0,)
    )
    assert positions.shape == targets.shape == (400, 15)
    there = targets >= 0
    assert (there.sum(1) == 14).all()  # 15 % of 90: the padding is not counted and never chosen
    np.testing.assert_array_equal(targets[there], np.take_along_axis(rows, positions, 1)[there])
    shown = np.take_along_axis(seen, positions, 1)[there]
    assert (shown == 1).mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == targets[there]).mean() == pytest.approx(0.1, abs=0.015)
    others = shown[(shown != 1) & (shown != targets[there])]
    assert len(others) / there.sum() == pytest.approx(0.1, abs=0.015) and others.min() > 1
    changed = np.zeros_like(rows, bool)
    np.put_along_axis(changed, positions[:, :14], True, 1)
    assert (seen == rows)[~changed].all()
    assert all(len(set(row[:14])) == 14 for row in positions)


def test_short_and_empty_rows():
    rows = np.array([[7, 8, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 10], np.int32)
    seen, _, targets = mask_tokens(rows, np.random.default_rng(0), mask=1, vocab_size=20, special=(0,))
    assert (targets[0] >= 0).sum() == 1 and (targets[1] == -1).all() and (seen[1] == 0).all()


def test_batches_are_a_function_of_seed_and_step():
    data = np.random.default_rng(0).integers(6, 11, 200).astype(np.uint8)
    make = lambda seed: masked_windows(data, TrainingConfig(batch_size=4, seed=seed), SMALL)  # noqa: E731
    first, again, other = make(1)(7), make(1)(7), make(2)(7)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any() and (first[0] != make(1)(8)[0]).any()
    assert first[0].shape == (4, 13) and first[1].shape == (4, 2)


def test_loss_is_that_of_the_chosen_positions_only():
    model = Bert(SMALL)
    fill(model)
    tokens = np.random.default_rng(3).integers(6, 11, (2, 13)).astype(np.int32)
    positions, targets = np.array([[2, 5], [4, 0]], np.int32), np.array([[7, 9], [6, -1]], np.int32)
    logits = model(Tensor(tokens)).numpy().astype(float)
    chances = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([chances[0, 2, 7], chances[0, 5, 9], chances[1, 4, 6]])
    assert masked_loss(model, Tensor(tokens), Tensor(positions), Tensor(targets)).item() == pytest.approx(
        expected, abs=1e-5
    )
    right = [logits[0, 2].argmax() == 7, logits[0, 5].argmax() == 9, logits[1, 4].argmax() == 6]
    for rows in (2, 1):
        score = MaskedEvaluator(model, (tokens, positions, targets), rows)()
        assert (score.loss, score.accuracy) == (
            pytest.approx(expected, abs=1e-5),
            pytest.approx(np.mean(right)),
        )
    # The third is a batch of its own.
    thrice = tuple(np.concatenate([part, part[:1]]) for part in (tokens, positions, targets))
    score, expected = (
        MaskedEvaluator(model, thrice, 2)(),
        -np.mean([chances[0, 2, 7], chances[0, 5, 9]] * 2 + [chances[1, 4, 6]]),
    )
    assert (score.loss, score.accuracy) == (
        pytest.approx(expected, abs=1e-5),
        pytest.approx(np.mean(right[:2] * 2 + right[2:])),
    )


def test_baselines_by_hand():
    data = np.array([6, 7, 6, 7, 6, 8], np.uint8)  # 6 is followed by 7 twice, by 8 once; 7 by 6
    windows = (np.array([[6, 5, 9]]), np.array([[1, 0]]), np.array([[7, 6]]))
    scores = counting_baselines(data, windows, vocab_size=10)
    unigram = {7: 2.1 / 7, 6: 3.1 / 7}
    assert scores["unigram"].loss == pytest.approx(-(math.log(unigram[7]) + math.log(unigram[6])) / 2)
    assert scores["unigram"].accuracy == 0.5  # always 6
    best = min(-math.log(w * 2 / 3 + (1 - w) * unigram[7]) for w in np.arange(1, 10) / 10)
    # Nothing stands left of the first token.
    assert scores["bigram"].loss == pytest.approx((best - math.log(unigram[6])) / 2)
    assert scores["bigram"].accuracy == 1.0


def test_heldout_masked_are_fixed_and_need_a_window():
    data = np.random.default_rng(0).integers(6, 11, 100).astype(np.uint8)
    once, again = heldout_masked(data, SMALL, 3), heldout_masked(data, SMALL, 3)
    assert once[0].shape == (3, 13) and all((a == b).all() for a, b in zip(once, again, strict=True))
    with pytest.raises(LamaError, match="as long as context_length; got 12 tokens, context_length=13"):
        heldout_masked(data[:12], SMALL, 3)


def test_bert_learns_what_both_sides_tell():
    """x = y and z, its neighbours: one side alone leaves half a bit of it open, ln 2 / 2."""
    config = BertConfig(
        8, 3, d_model=24, n_layers=2, n_heads=2, segments=0, pad=0, mask=1, norm="pre", norm_epsilon=1e-5
    )

    def batches(step: int) -> tuple[np.ndarray, ...]:
        bits = np.random.default_rng((0, step)).integers(0, 2, (32, 2))
        seen = np.stack([2 + bits[:, 0], np.ones(32, int), 2 + bits[:, 1]], 1).astype(np.int32)
        return seen, np.ones((32, 1), np.int32), (2 + (bits[:, :1] & bits[:, 1:])).astype(np.int32)

    model = Bert(config)
    losses = [
        step.loss
        for step in Trainer(
            model,
            batches,
            TrainingConfig(steps=150, batch_size=32, learning_rate=1e-2, warmup=10),
            masked_loss,
        )
    ]
    assert losses[0] > 1 and np.mean(losses[-10:]) < 0.05 < math.log(2) / 2


def test_training_beats_counting_and_fill_gives_the_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "text.txt").write_text(TEXT)
    out = str(tmp_path / "bert")
    flags = [*FLAGS, "--steps", "400", "--warmup", "20", "--learning-rate", "3e-3"]
    assert main(["bert", str(tmp_path / "text.txt"), "--out", out, *flags]) == 0
    told = capfd.readouterr()
    assert (
        "untrained |    unigram |     bigram |    trained" in told.out
        and "step 400: held-out loss" in told.out
    )
    model, tokenizer = lama.load(out)
    assert isinstance(model, Bert) and special_ids(tokenizer) == (model.config.pad, model.config.mask)
    assert main(["fill", out, f"the {MASK} odd sat."]) == 0
    predicted, filled = capfd.readouterr().out.splitlines()
    assert predicted.startswith("cat ") and filled == "the cat odd sat."
    monkeypatch.setattr("sys.stdin", io.StringIO(f"the {MASK} odd sat.\n\nno mask\n{MASK} {MASK} sat.\n"))
    assert main(["fill", out, "-"]) == 1  # a line for each
    first, *rest, last = capfd.readouterr().out.split("\n")[:-1]
    assert (first, rest) == ("the cat odd sat.", ["", ""]) and last.endswith(" sat.")
    assert main(["fill", out, f"the {MASK} odd sat.", "-n", "2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["text"] == "the cat odd sat." and found["masks"][0][0]["token"] == " cat"
    assert main(["bert", str(tmp_path / "text.txt"), "--out", out, *flags]) == 2
    assert "--out has earlier output of lama bert" in capfd.readouterr().err
    assert [len(best) for best in fill_in(model, tokenizer, f"my {MASK} {MASK} sat.", best=2)] == [2, 2]


def test_training_that_does_not_help_exits_with_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "text.txt").write_text(TEXT)
    assert (
        main(["bert", str(tmp_path / "text.txt"), "--out", str(tmp_path / "bert"), *FLAGS, "--steps", "2"])
        == 1
    )
    assert "lama: the trained model must beat the untrained one and the baselines" in capfd.readouterr().err


def test_stopped_training_ends_after_its_step(tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = {
        "batch_size": 4,
        "vocabulary": 270,
        "context_length": 8,
        "d_model": 8,
        "n_layers": 1,
        "n_heads": 2,
    }
    settings = BertSettings(steps=50, corpus=(str(tmp_path / "text.txt"),), **sizes)
    training = new_session(RunFolder(tmp_path / "out"), dataclasses.asdict(settings), "lama bert")
    steps = []
    for event in training:
        if isinstance(event, Step):
            steps.append(event.step)
            if event.step == 3:
                training.stop()
    assert steps == [1, 2, 3]


def test_each_mask_gets_its_own_token():
    assert filled_in(f"{MASK} and {MASK}", [" The", " cat"]) == "The and cat"
    assert filled_in(f"a{MASK} {MASK}{MASK}.", ["b", " c", "d"]) == "ab cd."


def test_fill_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    tokenizer = train_bpe(TEXT, 270, (PAD, MASK))
    pad, mask = special_ids(tokenizer)
    lama.save(
        tmp_path / "bert",
        Bert(BertConfig(270, 8, d_model=6, n_layers=1, n_heads=3, pad=pad, mask=mask)),
        tokenizer,
    )
    for text, message in (
        ("no mask", r"must have a [MASK] to fill in; got 'no mask'"),
        (f"{'x ' * 20}{MASK}", "must fit context_length; got 40 tokens"),
    ):
        assert main(["fill", str(tmp_path / "bert"), text]) == 1
        assert message in capfd.readouterr().err
    assert main(["fill", str(tmp_path / "bert"), MASK, "-n", "269"]) == 2
    assert "n must be at most 268, the tokens that the model can predict; got 269" in capfd.readouterr().err
    with pytest.raises(LamaError, match="must have the tokens"):
        special_ids(train_bpe(TEXT, 270))
