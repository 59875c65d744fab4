"""`lama experiment`: its reports, and that every experiment runs; whether the claims hold is for the full
budgets (slow).
"""

import json
import re

import numpy as np
import pytest

from lama.cli import main
from lama.experiments import ABOUT, Options, Report, find, recipe
from lama.experiments.arithmetic import operations
from lama.experiments.report import INK, Curve, Panel
from lama.experiments.words import counted, pieces
from lama.interp.pictures import HeatMap
from lama.models.gpt import GPT2_CONFIGS
from lama.tables import Table

QUICK = ("arithmetic", "scaling")


def test_table_lines_up_numbers_and_cuts_them_to_four_digits():
    table = Table(("model", "loss"), [("a", 1.23456), ("longer", 12345)])
    assert str(table).splitlines() == [
        "model  |   loss",
        "-------+-------",
        "a      |  1.235",
        "longer | 12,345",
    ]


def test_report_says_which_claims_hold():
    report = Report([Table(("x",), [(1,)])], claims={"one is one": True, "one is two": False})
    assert str(report).splitlines()[-2:] == ["holds: one is one", "DOES NOT HOLD: one is two"]


def test_picture_is_a_png_with_every_panel():
    panel = Panel("title", "step", "loss", [Curve("a", [1, 2], [3, 4])])
    assert Report([], [panel, panel, panel]).picture().startswith(b"\x89PNG")


def test_picture_is_the_same_bytes_again_and_has_other_letters_in_the_dark():
    report = Report(
        [],
        [
            Panel("title", "step", "loss", [Curve("a", [1, 2], [3, 4])], "x"),
            Panel("b", "k", "", [Curve("c", [1], [2])], bars=True),
        ],
    )
    light = report.picture("svg")
    assert light == report.picture("svg") and b">title</text>" in light and b"#e6e6e6" not in light
    assert b"#e6e6e6" in report.picture("svg", INK["dark"])


def test_html_is_one_file_with_all_of_the_report():
    panel = Panel("title", "step", "loss", [Curve("a", [1, 2], [3, 4])])
    heat = HeatMap(np.eye(3), "eye")
    report = Report(
        [Table(("model", "loss"), [("<a & b>", 1.23456)])],
        [panel],
        {"one is one": True, "one is two": False},
        [heat],
    )
    html = report.to_html("an experiment", "what it asks")
    assert html.startswith("<!doctype html>") and "<td>&lt;a &amp; b&gt;</td><td>1.235</td>" in html
    assert "<li>✓ one is one</li>" in html and "✗</span> one is two" in html
    assert html.count("data:image/svg+xml;base64,") == 2 and html.count("data:image/png;base64,") == 1
    assert set(re.findall(r"(?:src|href|srcset)=\"(.{5})", html)) == {"data:"} and "http" not in html
    assert "data:" not in report.to_html("an experiment", "what it asks", drawn=False)


def test_operations_of_gpt2_are_those_worked_out_by_hand():
    assert operations(GPT2_CONFIGS["gpt2"]) == (169_869_312, 37_748_736, 77_194_752)


@pytest.mark.parametrize("name", QUICK)
def test_claims_that_need_no_training_hold(name):
    report = find(name)(Options())
    assert report.claims and all(report.claims.values()), str(report)


def test_a_training_experiment_reports_each_of_its_models(monkeypatch):
    watched = []
    options = Options(steps=10, watch=lambda steps, total, label: watched.append((label, total)) or steps)
    report = find("tying")(options)
    assert watched == [(row[0], 10) for row in report.tables[0].rows]
    assert all(0 < row[2] < 6 for row in report.tables[0].rows)
    assert [curve.label for curve in report.panels[0].curves] == [row[0] for row in report.tables[0].rows]


def test_recipe_reports_each_change_and_the_best_of_several(monkeypatch):
    small = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 32, "context_length": 16, "batch_size": 4}
    read = recipe.read_settings
    monkeypatch.setattr(recipe, "read_settings", lambda name: {**read(name), **small, "precision": "float32"})
    changes = {
        recipe.RECIPE: ({},),
        recipe.ADAMW: ({"optimizer": "adamw"}, {"optimizer": "adamw", "steps": 1}),
    }
    monkeypatch.setattr(recipe, "CHANGES", changes)
    watched = []
    report = recipe.run(Options(steps=10, watch=lambda steps, n, label: watched.append((label, n)) or steps))
    assert len(watched) == 8 and {n for _, n in watched} == {10}
    assert [row[0] for row in report.tables[0].rows] == [*changes, "all of shakespeare-char-cpu"]
    assert report.tables[0].rows[0][3] == 0 and all(0 < row[2] < 6 for row in report.tables[0].rows)
    assert len(report.panels[0].curves) == 3


def test_words_and_what_stands_between_them_are_the_text():
    text = "To be, or\n'not' to be."
    assert pieces(text) == ["To", " ", "be", ", ", "or", "\n'", "not", "' ", "to", " ", "be", "."]
    assert "".join(pieces(text)) == text


def test_counting_words_and_pairs_by_hand():
    unigram, bigram = counted(np.array([1, 2, 1, 2, 1, 0]), np.array([1, 2, 1, 0]), n=3)
    shares = 2.1 / 6.3, 3.1 / 6.3, 1.1 / 6.3  # of 2, 1 and 0: what is to be guessed
    assert unigram == pytest.approx(-np.mean(np.log(shares)))
    mixed = [0.9 * after + 0.1 * alone for after, alone in zip((2 / 3, 1, 1 / 3), shares, strict=True)]
    assert bigram == pytest.approx(-np.mean(np.log(mixed)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ABOUT if name not in QUICK])
def test_claims_hold_with_the_full_budget(name):
    report = find(name)(Options())
    assert report.claims and all(report.claims.values()), str(report)


def test_experiment_writes_a_report_and_exits_0(tmp_path, capfd):
    out = tmp_path / "arithmetic"
    assert main(["experiment", "arithmetic", "--out", str(out)]) == 0
    assert "holds: the models have the published numbers of parameters" in capfd.readouterr().out
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["experiment"] == "arithmetic" and all(report["claims"].values())
    assert main(["experiment", "arithmetic", "--out", str(out)]) == 0  # again, in its own folder


def test_experiment_replaces_another_report_only_when_asked_to(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lama.experiments.arithmetic.run", lambda options: Report([]))
    command, report = (
        ["experiment", "arithmetic", "--seed"],
        tmp_path / "out" / "experiments" / "arithmetic" / "report.json",
    )
    assert main([*command, "1"]) == 0
    before = report.read_bytes()
    for damaged in (False, True):
        if damaged:
            report.write_bytes(before := b"[")
        assert main([*command, "2", "--out", "out/experiments/arithmetic"]) == 2
        assert (
            "--out has earlier output of lama experiment arithmetic, out/experiments/arithmetic. Replace it"
            in capfd.readouterr().err
        )
    assert main([*command, "2"]) == 0  # beside it, which is said
    assert (
        "out/experiments/arithmetic is not changed: writing to out/experiments/arithmetic-2\n"
        in capfd.readouterr().err
    )
    assert report.read_bytes() == before
    assert main([*command, "2", "--restart"]) == 0 and json.loads(report.read_text())["seed"] == 2
    (report.parent / "lama.json").unlink()  # an earlier version's
    assert main([*command, "3", "--restart", "--out", str(report.parent)]) == 0
    assert main(["experiment", "order", "--restart", "--out", str(report.parent)]) == 2
    assert "which has other files: report.html, report.json" in capfd.readouterr().err


def test_experiment_writes_its_curves_too(tmp_path, monkeypatch):
    panel = Panel("title", "step", "loss", [Curve("a", range(3), [1.0, 2.0, 3.0])])
    monkeypatch.setattr("lama.experiments.arithmetic.run", lambda options: Report([], [panel]))
    assert main(["experiment", "arithmetic", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["panels"][0]["curves"] == [{"label": "a", "x": [0, 1, 2], "y": [1.0, 2.0, 3.0]}]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>lama experiment arithmetic</h1>" in (tmp_path / "report.html").read_text("utf-8")


def test_experiment_exits_1_when_a_claim_does_not_hold(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("lama.experiments.arithmetic.run", lambda options: Report([], claims={"no": False}))
    assert main(["experiment", "arithmetic", "--out", str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    assert err == "lama: 1 of 1 claims do not hold. Try more --steps or another --seed\n"
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["tying", "--steps", "3"], "steps must be at least 10; got 3"),
        (["tying", "--seed", "-1"], "seed must be at least 0; got -1"),
        (["tying", "--out", __file__], "--out must be a folder; got the file"),
        (["tying", "--full"], "--full must go with grokking; got tying, which has one size"),
    ],
)
def test_wrong_usage_exits_2_in_one_line(argv, message, capfd):
    assert main(["experiment", *argv]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("lama: ") and err.count("\n") == 1 and message in err
