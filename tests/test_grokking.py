"""`lama experiment grokking`: its model, its measures, that it goes on where it stopped; whether it groks is
for the full budget (slow).
"""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tinygrad import Tensor

from lama.cli import main
from lama.errors import LamaError
from lama.experiments import Options, Stopped, find, grokking
from lama.experiments.grokking import Addition, Setting, answers, fit, generalised, loss
from lama.models.gpt import GPT
from lama.training.folder import RunFolder

SMALL = Setting(11, 0.5, 8, 17, 1e-2, 30, memorised_by=30, evaluate_every=10, snapshot_every=10, tidy=10)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(grokking, "QUICK", SMALL)


def rows(report) -> list:
    return [list(row) for table in report.tables for row in table.rows]


def test_addition_has_every_pair_once_and_its_share_of_examples():
    task = Addition(11, 0.3, seed=5)
    assert len({tuple(row) for row in task.tokens.tolist()}) == 121 and task.examples.sum() == 36
    assert task.tokens[11 * 7 + 9].tolist() == [7, 9, 11] and task.sums[11 * 7 + 9] == 5
    assert (Addition(11, 0.3, seed=6).examples != task.examples).any()


def test_losses_are_those_of_a_softmax():
    task = Addition(3, 0.5, seed=0)
    logits = np.zeros((9, 3))
    np.testing.assert_allclose(task.losses(logits), np.log(3))
    logits[np.arange(9), task.sums] = 100
    np.testing.assert_allclose(task.losses(logits.reshape(3, 3, 3)), 0, atol=1e-12)


def test_answers_are_the_models_own_logits_at_the_last_position(small):
    task = Addition(11, 0.5, seed=0)
    kept = fit(Options(steps=10), SMALL, task, "any", 1.0, 10)
    tokens = Tensor(task.tokens)
    np.testing.assert_allclose(
        answers(kept.model, tokens).numpy(), kept.model(tokens).numpy()[:, -1, :11], atol=1e-5
    )


def test_loss_has_a_gradient_where_float32_has_none_left():
    task = Addition(11, 0.5, seed=0)
    model = fit(Options(), SMALL, task, "any", 1.0, 1).model
    assert isinstance(model, GPT) and model.unembed is not None
    model.unembed.weight.assign(model.unembed.weight * 0).realize()
    bias = Tensor.ones(1, 8)
    model.blocks[0].mlp.down.weight.assign(Tensor.zeros(8, 17)).realize()
    model.blocks[0].attn.out.weight.assign(Tensor.zeros(8, 8)).realize()
    model.embed.weight.assign(Tensor.ones(12, 8)).realize()
    model.pos_embed.weight.assign(Tensor.zeros(3, 8)).realize()
    # 24 for answer 0, 0 for the others.
    model.unembed.weight.assign(bias * Tensor([3.0] + [0.0] * 11).reshape(12, 1)).realize()
    value = loss(model, Tensor([[0, 0, 11]]), Tensor([0]))
    np.testing.assert_allclose(value.item(), 10 * np.exp(-24), rtol=1e-4)  # below what float32 keeps beside 1


def test_generalised_waits_until_memorisation_is_cleaned_up():
    log = [(step, 0, 0, 1, 0.5 if step < 100 else 1.0, 0) for step in range(10, 120, 10)]
    setting = replace(SMALL, tidy=15)
    assert (
        not generalised([], setting)
        and not generalised(log[:9], setting)
        and not generalised(log[:11], setting)
    )
    assert generalised([*log, (120, 0, 0, 1, 1.0, 0)], setting)
    assert not generalised([*log, (120, 0, 0, 1, 0.5, 0)], setting)
    assert not generalised([*log, (120, 0, 0.01, 1, 1.0, 0)], setting)


def test_grokking_reports_both_trainings(small):
    report = find("grokking")(Options())
    (decay, control), measured = report.tables[0].rows, dict(report.tables[2].rows)
    assert (decay[0], decay[1], control[0]) == ("weight decay", 30, "no weight decay")
    assert decay[5] < np.log(11) and control[5] < np.log(11)  # both learn their examples
    assert measured["loss of uniform predictions, ln p"] == pytest.approx(np.log(11))
    assert [panel.title for panel in report.panels] == [
        "loss",
        "accuracy",
        "restricted and excluded loss",
        "weights",
        "Fourier components",
        "neurons, sorted",
    ]
    assert report.panels[2].curves[2].x == [10, 20, 30]  # restricted loss at every snapshot
    assert len(report.claims) == 7 and len(report.maps) >= 4


def test_grokking_stopped_and_gone_on_with_is_the_one_that_was_not_stopped(small, tmp_path):
    def stop_at(last):
        def watch(steps, total, label):
            for step in steps:
                yield step
                if (label, step.step) == last:
                    raise Stopped(label)

        return watch

    whole = find("grokking")(Options(seed=3))
    for last in (("weight decay", 17), ("weight decay", 23), ("no weight decay", 12)):
        with pytest.raises(Stopped):
            find("grokking")(Options(seed=3, folder=tmp_path, watch=stop_at(last)))
    again = find("grokking")(Options(seed=3, folder=tmp_path))
    assert rows(again) == rows(whole) and again.panels == whole.panels


def test_grokking_stopped_by_ctrl_c_says_how_to_go_on_and_goes_on(small, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    evaluate = grokking.evaluate

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(grokking, "evaluate", interrupted)
    assert main(["experiment", "grokking", "--seed", "3", "--out", str(out)]) == 130
    err = capfd.readouterr().err
    command = f"lama experiment grokking --seed=3 --out {out}"
    assert f"lama: stopped by SIGINT in weight decay, step 10 of 30; resume with: {command}\n" in err
    monkeypatch.setattr(grokking, "evaluate", evaluate)
    assert main(["experiment", "grokking", "--out", str(out)]) == 2  # of another seed
    assert (
        f"--out has an unfinished experiment, {out}: resume it, {command}, delete it"
        in capfd.readouterr().err
    )
    assert main([*command.split()[1:]]) == 1  # thirty steps are too few for the claims
    assert "step 11 of 30" in capfd.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "lama.json",
        "maps.png",
        "report.html",
        "report.json",
    ]
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert (report["experiment"], report["seed"], report["full"]) == ("grokking", 3, False)
    assert report["panels"][0]["curves"][0]["x"] == [10, 20, 30]


def test_grokking_whose_settings_are_damaged_begins_anew_only_when_asked_to(small, tmp_path, capfd):
    folder = tmp_path / "out" / "unfinished"
    folder.mkdir(parents=True)
    (tmp_path / "out" / "lama.json").write_text('{"made_by": "experiment grokking"}')
    for content in ("[" * 100_000, '{"experiment": 5}', "5", ""):
        (folder / "settings.json").write_text(content)
        assert main(["experiment", "grokking", "--out", str(tmp_path / "out")]) == 2
        assert "has an unfinished experiment, " in capfd.readouterr().err and list(folder.iterdir()) == [
            folder / "settings.json"
        ]
    (folder / "mine").symlink_to(tmp_path)
    assert main(["experiment", "grokking", "--out", str(tmp_path / "out"), "--restart"]) == 1
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"step": np.array([1.0])}, "step"),
        ({"step": np.array([99])}, "step"),
        ({"log": np.zeros((2, 5))}, "log"),
        ({"log": np.array([["a"]]).astype("S1").view(np.uint8)}, "log"),
        ({"7.embed.weight": np.zeros((2, 2), np.float32)}, "7.embed.weight"),
    ],
)
def test_grokking_refuses_a_file_with_other_arrays(small, tmp_path, changes, wrong):
    task = Addition(11, 0.5, seed=0)
    fit(Options(folder=tmp_path), SMALL, task, "any", 1.0, 1)
    save_file({**load_file(tmp_path / "any.safetensors"), **changes}, tmp_path / "any.safetensors")
    with pytest.raises(
        LamaError,
        match=rf"any.safetensors is not this training's state: its {wrong} differs. Start over",
    ):
        fit(Options(folder=tmp_path), SMALL, task, "any", 1.0, 1)


def test_grokking_in_a_folder_where_it_already_runs_is_refused(small, tmp_path, capfd):
    with RunFolder(tmp_path / "out").alone():
        assert main(["experiment", "grokking", "--out", str(tmp_path / "out")]) == 1
    assert "another process is working in" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_grokking_refuses_a_file_of_another_model(small, tmp_path):
    task = Addition(11, 0.5, seed=0)
    fit(Options(folder=tmp_path), SMALL, task, "any", 1.0, 1)
    with pytest.raises(
        Exception,
        match=r"any.safetensors is not this training's state: its .* differs. Start over with --restart",
    ):
        fit(Options(folder=tmp_path), replace(SMALL, d_mlp=19), task, "any", 1.0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_grokking_ends_in_few_frequencies_whatever_the_seed(seed):
    report = find("grokking")(Options(seed=seed))
    when = list(report.claims)[:3]  # how long it takes depends on the seed
    assert all(holds for claim, holds in report.claims.items() if claim not in when), str(report)
