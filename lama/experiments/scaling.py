"""Compare scores, weights and gradients with and without the division by √d. Source: Vaswani et al. 2017."""

import numpy as np
from tinygrad import Tensor

from lama.attention import attention, dot, scaled_dot
from lama.experiments.report import Options, Panel, Report, Table, column_curve
from lama.ops import softmax
from lama.shapes import Array

WIDTHS = (4, 16, 64, 256, 1024)
QUERIES, KEYS = 2000, 64
PAIRS = 20_000  # pairs of a query and a key, for the variance


def slope(p: Array) -> float:
    """The mean norm of the softmax's Jacobian diag(p) − p pᵀ, which multiplies the gradient."""
    p = p.astype(np.float64)
    square = (p**2).sum(-1)
    return float(np.sqrt(np.maximum(0, square - 2 * (p**3).sum(-1) + square**2)).mean())


def run(options: Options) -> Report:
    rng = np.random.default_rng(options.seed)

    def normal(*size: int) -> Tensor:
        return Tensor(rng.standard_normal(size).astype(np.float32))

    rows = []
    for d in WIDTHS:
        a, b = normal(PAIRS, 1, d), normal(PAIRS, 1, d)
        variances = [float(score(a, b).numpy().var()) for score in (dot, scaled_dot)]
        q, k = normal(1, QUERIES, d), normal(1, KEYS, d)
        weights = [softmax(score(q, k)).numpy()[0] for score in (dot, scaled_dot)]
        rows.append((d, *variances, *(float(p.max(-1).mean()) for p in weights), *map(slope, weights)))
    variance = "variance of q·k", "of q·k / √d"
    columns = ("d", *variance, "largest weight", "with / √d", "slope", "slope with / √d")
    sizes = {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 11)}
    q, k, v = (normal(*size) for size in sizes.values())
    out = attention(q, k, v)
    shapes = [(name, *shape) for name, shape in {**sizes, "result": out.shape}.items()]

    def panel(title: str, y: str, column: int) -> Panel:
        curves = [column_curve("q·k", rows, column), column_curve("q·k / √d", rows, column + 1)]
        return Panel(title, "d", y, curves)

    last, slopes, scaled = rows[-1], [row[5] for row in rows], [row[6] for row in rows]
    one_key, same = last[3] > 0.8 and last[4] < 0.3, max(scaled) < 1.1 * min(scaled)
    free = out.shape == (2, 3, 5, 11)
    return Report(
        [Table(columns, rows), Table(("", "batch", "heads", "positions", "width"), shapes)],
        [panel("largest of 64 weights", "mean", 3), panel("slope of the softmax", "norm", 5)],
        {
            "the variance of q·k is d, within 5 %": all(abs(row[1] / row[0] - 1) < 0.05 for row in rows),
            "divided by √d it is 1": all(abs(row[2] - 1) < 0.05 for row in rows),
            f"without the division one key of {KEYS} gets nearly all of the weight at d = {last[0]}": one_key,
            "and the gradient is less than half of its largest": last[5] < max(slopes) / 2,
            "with the division the gradient is the same for every d, within a tenth": same,
            "values may have another width than keys, and keys another number than queries": free,
        },
    )
