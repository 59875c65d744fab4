"""The loss curve: what is drawn is what the log says."""

import math
import subprocess
import sys

import numpy as np
import pytest

from lama.errors import LamaError
from lama.training.curve import draw, loss_curve, smoothed

BASELINES = {"uniform": 5.545, "unigram": 3.1, "bigram": 2.33, "trigram": 2.32}


def records(steps: int, every: int = 5, untrained: float = 5.6) -> list[dict[str, object]]:
    log: list[dict[str, object]] = [
        {"config": {"steps": steps}, "baselines": BASELINES, "untrained": untrained}
    ]
    for step in range(1, steps + 1):
        log.append(
            {
                "step": step,
                "loss": 1 + 4 / step,
                "learning_rate": step / 1000,
                "gradient_norm": 1.0,
                "mfu": None,
                "seconds": step,
            }
        )
        if step % every == 0:
            log.append({"step": step, "validation_loss": 1.1 + 4 / step, "bits_per_byte": 2.0})
    return log


def test_smoothed_is_the_mean_of_the_neighbours():
    assert smoothed(np.array([3.0, 0.0, 6.0])).tolist() == [3, 3, 6]
    values = np.random.default_rng(0).normal(size=307)
    assert smoothed(values)[50] == pytest.approx(values[46:55].mean())  # four to each side
    assert smoothed(values)[2] == pytest.approx(values[:5].mean())
    np.testing.assert_allclose(smoothed(np.arange(1000.0)), np.arange(1000))  # nothing comes late
    assert len(smoothed(np.zeros(0))) == 0


@pytest.fixture(scope="module")
def figure():
    pytest.importorskip("matplotlib", reason="the package matplotlib (extra `plots`) is not installed")
    return draw(records(20))


def test_curve_shows_every_step_and_every_evaluation(figure):
    raw, _, heldout = figure.axes[0].get_lines()[:3]
    assert raw.get_xdata().tolist() == list(range(1, 21))
    np.testing.assert_allclose(raw.get_ydata(), 1 + 4 / np.arange(1, 21))
    assert heldout.get_xdata().tolist() == [0, 5, 10, 15, 20]  # before training too
    assert heldout.get_ydata()[[0, -1]].tolist() == [5.6, pytest.approx(1.3)]
    assert figure.axes[0].get_title(loc="left") == "best held-out loss 1.300 nats per token at step 20"
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == [step / 1000 for step in range(1, 21)]


def test_curve_shows_baselines_dashed_and_named_without_overlap(figure):
    dashed = [line.get_ydata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert dashed == list(BASELINES.values())
    labels = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert list(labels) == ["trigram 2.320", "bigram 2.330", "unigram 3.100", "uniform 5.545"]
    heights = list(labels.values())
    assert min(np.diff(heights)) > 0.04
    bottom, top = figure.axes[0].get_ylim()
    assert heights[0] == pytest.approx((2.32 - bottom) / (top - bottom))


def test_loss_curve_is_a_png_of_its_size_whatever_the_length():
    pytest.importorskip("matplotlib", reason="the package matplotlib (extra `plots`) is not installed")
    for log in (
        [],
        records(0),
        records(1),
        records(20),
        records(5000, 250),
        [{"step": 3, "loss": 2.0, "learning_rate": 1e-3}],
    ):
        png = loss_curve(log)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert [int.from_bytes(png[at : at + 4]) for at in (16, 20)] == [1200, 825]


def test_curve_leaves_out_what_is_not_finite():
    pytest.importorskip("matplotlib", reason="the package matplotlib (extra `plots`) is not installed")
    log = [
        *records(4, untrained=math.nan),
        {"step": 5, "loss": math.nan, "learning_rate": 0.1},
        {"step": 5, "validation_loss": math.inf},
    ]
    raw, _, heldout = draw(log).axes[0].get_lines()[:3]
    assert raw.get_xdata().tolist() == [1, 2, 3, 4]
    assert heldout.get_xdata().tolist() == []


def test_curve_of_a_long_run_draws_few_points():
    pytest.importorskip("matplotlib", reason="the package matplotlib (extra `plots`) is not installed")
    lines = draw(records(5000, 250)).axes[0].get_lines()
    assert 1000 < len(lines[0].get_xdata()) == len(lines[1].get_xdata()) <= 2000


def test_curve_needs_neither_a_screen_nor_tinygrad():
    pytest.importorskip("matplotlib", reason="the package matplotlib (extra `plots`) is not installed")
    code = """
import sys
from lama.training.curve import loss_curve
assert "matplotlib" not in sys.modules
loss_curve([])
assert not {"matplotlib.pyplot", "tinygrad"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_curve_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        LamaError,
        match=r"^matplotlib, which draws a loss curve, is not installed\. Run: pip install matplotlib$",
    ):
        loss_curve([])
