"""The loss curve of a run, drawn from its log."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lama.figures import make_figure, render
from lama.shapes import Array
from lama.training.lines import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = 2000  # the most points of a line: more than the picture has pixels
GAP = 0.045  # between two labels, as a share of the height
TRAIN, VALIDATION, BASELINE = "#3b6fb6", "#c8452d", "#777777"


def loss_curve(log: Sequence[Record]) -> bytes:
    """A PNG, 1200 x 825: training loss, held-out loss, baselines, and below the learning rate.

    `log` is the records of a run's log.jsonl; lines without records are left out. Raises LamaError if
    matplotlib is not installed.
    """
    return render(draw(log))


def draw(log: Sequence[Record]) -> "Figure":
    """The figure of `loss_curve`."""
    figure = make_figure("a loss curve", figsize=(8, 5.5), dpi=150, layout="constrained")
    from matplotlib.ticker import MaxNLocator

    losses, rates = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    steps, loss = series(log, "loss")
    smooth = smoothed(loss)
    thin = slice(None, None, max(1, math.ceil(len(steps) / DRAWN)))
    losses.plot(steps[thin], loss[thin], color=TRAIN, alpha=0.3, linewidth=0.7, label="training, each step")
    losses.plot(steps[thin], smooth[thin], color=TRAIN, linewidth=1.6, label="training, smoothed")

    start: Record = next((record for record in log if "baselines" in record), {})
    heldout = [{"step": 0, "validation_loss": start["untrained"]}] if "untrained" in start else []
    evaluated, validation = series([*heldout, *log], "validation_loss")
    style = {"color": VALIDATION, "marker": "o", "markersize": 4, "linewidth": 1.2, "zorder": 3}
    losses.plot(evaluated, validation, label="held out", **style)
    last = max([1, *steps[-1:], *evaluated[-1:]])
    losses.set_xlim(0, last * 1.01)
    lines = {f"{name} {value:.3f}": value for name, value in start.get("baselines", {}).items()}
    if len(validation):
        best = int(np.argmin(validation))
        title = f"best held-out loss {validation[best]:.3f} nats per token at step {evaluated[best]:,}"
        losses.set_title(title, fontsize=10, loc="left")
    for value in lines.values():
        losses.axhline(value, color=BASELINE, linestyle="--", linewidth=0.9, zorder=1)
    label(losses, lines)
    losses.set_ylabel("loss, nats per token")
    losses.legend(loc="upper right", framealpha=1, edgecolor="none", fontsize=8)

    at, rate = series(log, "learning_rate")
    rates.plot(at[thin], rate[thin], color=TRAIN, linewidth=1.2)
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    rates.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def series(log: Sequence[Record], name: str) -> tuple[Array, Array]:
    """The steps and values of the records that have a finite value of that name."""
    steps, values = [], []
    for record in log:
        value = record.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(record.get("step"))
            values.append(value)
    return np.array(steps, int), np.array(values, float)


def smoothed(values: Array) -> Array:
    """The mean of each value and its neighbours, a hundredth of all values on each side.

    Near the ends there are fewer neighbours, but the same number on each side, so that the curve is not
    delayed: `[3, 0, 6]` gives `[3, 3, 6]`.
    """
    n = len(values)
    reach = np.minimum(np.minimum(np.arange(n), np.arange(n)[::-1]), math.ceil(n / 100))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[np.arange(n) + reach + 1] - sums[np.arange(n) - reach]) / (2 * reach + 1)


def label(axes: "Axes", lines: Mapping[str, float]) -> None:
    """Write each line's name to the right of it, moved up if it would overlap the one below."""
    bottom, top = axes.get_ylim()
    lowest = -math.inf
    for text, value in sorted(lines.items(), key=lambda line: line[1]):
        lowest = max((value - bottom) / (top - bottom), lowest + GAP)
        axes.text(1.01, lowest, text, transform=axes.transAxes, color=BASELINE, fontsize=8, va="center")
