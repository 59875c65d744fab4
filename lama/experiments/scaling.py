"""Why softmax(QKᵀ / √d)? Scores, weights and gradients with and without the division. Source: Vaswani et al. 2017, 3.2.1."""

import numpy as np
from tinygrad import Tensor

from lama.attention import attention, dot, scaled_dot
from lama.experiments.report import Curve, Options, Panel, Report, Table
from lama.kernels import softmax

WIDTHS = (4, 16, 64, 256, 1024)
QUERIES, KEYS = 2000, 64
PAIRS = 20_000  # of a query and a key of its own, for the variance


def slope(p: np.ndarray) -> float:
    """The mean norm of the softmax's Jacobian diag(p) − p pᵀ: what a gradient is multiplied by on its way back."""
    p = p.astype(np.float64)
    square = (p**2).sum(-1)
    return float(np.sqrt(np.maximum(0, square - 2 * (p**3).sum(-1) + square**2)).mean())


def run(options: Options) -> Report:
    rng = np.random.default_rng(options.seed)
    rows = []
    for d in WIDTHS:
        pair = [Tensor(rng.standard_normal((PAIRS, 1, d)).astype(np.float32)) for _ in "qk"]
        variances = [float(score(*pair).numpy().var()) for score in (dot, scaled_dot)]
        q, k = (Tensor(rng.standard_normal((1, n, d)).astype(np.float32)) for n in (QUERIES, KEYS))
        weights = [softmax(score(q, k)).numpy()[0] for score in (dot, scaled_dot)]
        rows.append((d, *variances, *(float(p.max(-1).mean()) for p in weights), *map(slope, weights)))
    columns = ("d", "variance of q·k", "of q·k / √d", "largest weight", "with / √d", "slope", "slope with / √d")
    sizes = {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 11)}
    q, k, v = (Tensor(rng.standard_normal(shape).astype(np.float32)) for shape in sizes.values())
    out = attention(q, k, v)
    shapes = Table(("", "batch", "heads", "positions", "width"), [(name, *shape) for name, shape in {**sizes, "result": out.shape}.items()])
    last = rows[-1]
    return Report(
        [Table(columns, rows), shapes],
        [
            Panel(
                "largest of 64 weights", "d", "mean", [Curve(n, WIDTHS, [row[i] for row in rows]) for n, i in (("q·k", 3), ("q·k / √d", 4))]
            ),
            Panel(
                "slope of the softmax", "d", "norm", [Curve(n, WIDTHS, [row[i] for row in rows]) for n, i in (("q·k", 5), ("q·k / √d", 6))]
            ),
        ],
        {
            "the variance of q·k is d, within 5 %": all(abs(row[1] / row[0] - 1) < 0.05 for row in rows),
            "divided by √d it is 1": all(abs(row[2] - 1) < 0.05 for row in rows),
            f"without the division one key of {KEYS} gets nearly all of the weight at d = {last[0]}": last[3] > 0.8 > 0.3 > last[4],
            "and the gradient that comes back is less than half of what it was at its best": last[5] < max(row[5] for row in rows) / 2,
            "with the division the gradient is the same for every d, within a tenth": max(row[6] for row in rows)
            < 1.1 * min(row[6] for row in rows),
            "values may have another width than keys, and keys another number than queries": out.shape == (2, 3, 5, 11),
        },
    )
