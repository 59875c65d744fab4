"""Views for notebooks, with the content of `lama attention`, `lens`, `patch` and `heads`.

Each function returns a `View`. Jupyter draws it by `_repr_html_`; `print` shows it as text. Views are static,
load nothing, and have colours for light and dark pages.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from lama.data.inputs import input_tokens
from lama.interp.answers import single_token
from lama.interp.attention import attention_of, chosen_heads, summary
from lama.interp.heads import head_scores
from lama.interp.interventions import patch as run_patching
from lama.interp.labels import token_labels
from lama.interp.lens import logit_lens
from lama.interp.page import attention_page
from lama.interp.record import run_with_cache
from lama.models.gpt import GPT
from lama.models.registry import Model, describe
from lama.shapes import Array
from lama.tables import Table
from lama.tokenizers import Tokenizer

PLUS, MINUS = "28, 110, 200", "214, 104, 26"  # colours of positive and negative numbers, as red, green, blue
CELL = "padding:1px 5px;text-align:center;font-size:12px;white-space:pre"
LINES = ("#1f6fc5", "#d4691a", "#2c9a5b", "#a04fc0", "#888888")
WIDTH, HEIGHT, EDGE = 560, 240, 44  # of a plot, in pixels
LIVE = 1.0  # seconds between two drawings of a live plot


@dataclass(frozen=True)
class View:
    """A result to show: HTML for a notebook, text for a terminal."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


@runtime_checkable
class Report(Protocol):
    """A report of training, such as `lama.training.loop.Step`."""

    step: int
    loss: float


R = TypeVar("R", bound=Report)


def matrix(
    values: Array,
    rows: Sequence[object] = (),
    columns: Sequence[object] = (),
    title: str = "",
    cells: Sequence[Sequence[str]] | None = None,
    high: float | None = None,
) -> View:
    """A table of numbers (n, m) on colours: blue above 0, orange below, strongest at `high`.

    `cells` are texts (n, m) to show instead of the numbers, which then only give the colours.
    """
    values = np.asarray(values, np.float64)
    names = [str(row) for row in rows] or [""] * len(values)
    most = high or float(np.abs(np.nan_to_num(values)).max(initial=0)) or 1.0
    shown = cells or [[f"{value:.2f}" for value in row] for row in values]
    body = [f"<tr><td></td>{''.join(_cell(str(column)) for column in columns)}</tr>"] if len(columns) else []
    for name, numbers, texts in zip(names, values, shown, strict=True):
        coloured = (_cell(text, number / most) for text, number in zip(texts, numbers, strict=True))
        body.append(f"<tr>{_cell(name)}{''.join(coloured)}</tr>")
    html = f'<table style="border-collapse:collapse;margin:4px 0">{"".join(body)}</table>'
    heads = ["", *map(str, columns)] if len(columns) else [""] * (1 + values.shape[1])
    text = str(Table(heads, [[name, *row] for name, row in zip(names, shown, strict=True)]))
    return View(_titled(title, html), f"{title}\n{text}" if title else text)


def _cell(text: str, strength: float = 0.0) -> str:
    strength = float(np.nan_to_num(strength))
    colour = f"background:rgba({MINUS if strength < 0 else PLUS}, {min(1, abs(strength)) * 0.75:.2f})"
    return f'<td style="{CELL};{colour if strength else ""}">{escape(text)}</td>'


def _titled(title: str, html: str) -> str:
    return f"<div><b>{escape(title)}</b>{html}</div>" if title else f"<div>{html}</div>"


def attention(
    model: Model, tokenizer: Tokenizer, text: str, layer: int | None = None, head: int | None = None
) -> View:
    """The page of `lama attention` for a text. Raises LamaError as `attention_of` and `attention_page` do."""
    found = attention_of(model, tokenizer, input_tokens(model, tokenizer, text))
    kind, heads = chosen_heads(model, None, layer, head)
    page = attention_page(found, describe(model), kind, layer, head, text)
    style = "width:100%;height:640px;border:1px solid rgba(128, 128, 128, 0.4)"
    html = f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(page)}"></iframe>'
    return View(html, summary(found[kind], heads))


def pattern(model: Model, tokenizer: Tokenizer, text: str, layer: int, head: int) -> View:
    """One head's attention as a matrix: a row for each query, a column for each key. Raises LamaError."""
    kind, _ = chosen_heads(model, None, layer, head)
    found = attention_of(model, tokenizer, input_tokens(model, tokenizer, text))[kind]
    return matrix(found.patterns[layer, head], found.queries, found.keys, f"head {layer}.{head}", high=1)


def lens(model: GPT, tokenizer: Tokenizer, text: str, answer: str | None = None) -> View:
    """The likeliest next token after each layer, at each token of a text; the last layer is on top.

    Colours are probabilities, of that token or, if it is given, of `answer`. Raises LamaError.
    """
    tokens = input_tokens(model, tokenizer, text)
    found = logit_lens(model, tokens, None if answer is None else single_token(tokenizer, answer), k=1)
    stages = ["embedding", *(f"layer {i}" for i in range(len(found.rank) - 1))]
    words = [token_labels(tokenizer, row[:, 0]) for row in found.top]
    numbers = found.top_probability[..., 0] if answer is None else found.probability
    what = "its probability" if answer is None else f"the probability of {answer!r}"
    title = f"likeliest next token after each layer; the colour is {what}"
    return matrix(numbers[::-1], stages[::-1], token_labels(tokenizer, tokens), title, words[::-1], high=1)


def patch(
    model: GPT,
    tokenizer: Tokenizer,
    clean: str,
    corrupted: str,
    answer: str,
    against: str,
    site: str = "resid_pre",
) -> View:
    """Results of `lama.interp.interventions.patch`: 1 where one activation restores the clean answer."""
    first, second = (input_tokens(model, tokenizer, text) for text in (clean, corrupted))
    ids = single_token(tokenizer, answer), single_token(tokenizer, against)
    found = run_patching(model, first, second, *ids, site)
    columns = list(range(found.effect.shape[1])) if site == "z" else token_labels(tokenizer, first)
    title = f"{site}: {answer!r} above {against!r}, 0 corrupted, 1 clean"
    return matrix(found.effect, [f"layer {i}" for i in range(len(found.effect))], columns, title, high=1)


def heads(model: GPT, length: int = 50, n: int = 4) -> View:
    """Scores of all heads on repeated random tokens, as in `lama heads`. Raises LamaError."""
    found = head_scores(model, length, n)
    scores = {"previous token": found.previous_token, "induction": found.induction}
    scores |= {} if found.copying is None else {"copying": found.copying}
    rows = [f"layer {i}" for i in range(model.config.n_layers)]
    views = [matrix(value, rows, range(model.config.n_heads), name, high=1) for name, value in scores.items()]
    return View("".join(view.html for view in views), "\n\n".join(view.text for view in views))


def surprise(model: GPT, tokenizer: Tokenizer, text: str) -> View:
    """A text in which each token's colour is its loss in nats, given those before it. Raises LamaError."""
    tokens = input_tokens(model, tokenizer, text)
    logits, _ = run_with_cache(model, [tokens], "embed")
    at = logits[0, :-1].astype(np.float64)
    at -= at.max(-1, keepdims=True)
    losses = np.log(np.exp(at).sum(-1)) - at[np.arange(len(at)), tokens[1:]]
    labels, words = (
        token_labels(tokenizer, tokens),
        [escape(label) for label in token_labels(tokenizer, tokens)],
    )
    spans = [f"<span>{words[0]}</span>"]
    for word, loss in zip(words[1:], losses, strict=True):
        style = f"background:rgba({MINUS}, {min(1, loss / 10) * 0.8:.2f});padding:2px 0"
        spans.append(f'<span style="{style}" title="{loss:.2f} nats">{word}</span>')
    mean = f"mean {losses.mean():.2f} nats per token" if len(losses) else "one token has no loss"
    rows = [[label, f"{loss:.2f}"] for label, loss in zip(labels[1:], losses, strict=True)]
    return View(
        _titled(mean, f'<p style="line-height:2">{"".join(spans)}</p>'), str(Table(["token", "nats"], rows))
    )


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], title: str = "", x: str = "step", log: bool = False
) -> View:
    """Lines (x, y) by name, as a plot; y on a logarithmic scale with `log`.

    Values that are not finite are left out.
    """
    scale = np.log if log else np.asarray
    kept = {}
    for name, points in lines.items():
        array = np.array([*points], np.float64).reshape(-1, 2)
        kept[name] = array[np.isfinite(array).all(1) & ((array[:, 1] > 0) | (not log))]
    every = np.concatenate([*kept.values(), np.zeros((0, 2))])
    if not len(every):
        return View(_titled(title, "<i>no numbers yet</i>"), f"{title}: no numbers yet")
    low, high = every.min(0), every.max(0)
    bottom, top = scale(low[1]), scale(high[1])

    def place(array: Array) -> str:
        across = EDGE + (array[:, 0] - low[0]) / max(high[0] - low[0], 1e-12) * (WIDTH - EDGE - 10)
        down = 10 + (top - scale(array[:, 1])) / max(top - bottom, 1e-12) * (HEIGHT - 40)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))

    parts, legend, rows = [], [], []
    for (name, array), colour in zip(kept.items(), LINES * (1 + len(kept) // len(LINES)), strict=False):
        parts.append(f'<polyline points="{place(array)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        legend.append(f'<span style="color:{colour}">▬ {escape(name)}</span>')
        rows.append([name, *([f"{array[0, 1]:.4g}", f"{array[-1, 1]:.4g}"] if len(array) else ["", ""])])
    words = [(2, 16, f"{high[1]:.4g}"), (2, HEIGHT - 28, f"{low[1]:.4g}")]
    words += [(EDGE, HEIGHT - 8, f"{low[0]:g}"), (WIDTH - 90, HEIGHT - 8, f"{x} {high[0]:g}")]
    texts = "".join(
        f'<text x="{a}" y="{b}" font-size="12" fill="currentColor">{escape(word)}</text>'
        for a, b, word in words
    )
    frame = f'<rect x="{EDGE}" y="10" width="{WIDTH - EDGE - 10}" height="{HEIGHT - 40}" fill="none" '
    frame += 'stroke="currentColor" opacity="0.3"/>'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" style="max-width:100%"'
    svg = f"<svg {size}>{frame}{texts}{''.join(parts)}</svg>"
    return View(
        _titled(title, f"<div>{svg}</div><div>{' '.join(legend)}</div>"),
        str(Table([title, "first", "last"], rows)),
    )


def live(reports: Iterable[R], title: str = "training loss", every: float = LIVE) -> Iterator[R]:
    """Yield the reports of a training unchanged, and plot their loss below the cell while it runs.

    In a notebook the plot is redrawn every `every` seconds; elsewhere nothing is drawn.
    """
    try:
        from IPython import get_ipython  # type: ignore[import-not-found]
        from IPython.display import display  # type: ignore[import-not-found]
    except ImportError:
        yield from reports
        return
    points: list[tuple[float, float]] = []
    handle = display(curves({"loss": points}, title), display_id=True) if get_ipython() else None
    drawn = time.monotonic()
    for report in reports:
        points.append((report.step, report.loss))
        if handle is not None and time.monotonic() - drawn > every:
            handle.update(curves({"loss": points}, title))
            drawn = time.monotonic()
        yield report
    if handle is not None:
        handle.update(curves({"loss": points}, title))
