"""Attention patterns of all heads of a model while it reads a text, with labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from tinygrad import Tensor

from lama.attention import scale_of
from lama.data.inputs import check_length
from lama.errors import LamaError, UsageError
from lama.interp import ATTENTION_KINDS
from lama.interp.labels import token_labels
from lama.interp.pictures import HeatMap
from lama.interp.record import as_tokens
from lama.models.encoder_decoder import Transformer
from lama.models.protocol import AttentionSite
from lama.models.registry import Model
from lama.shapes import Array
from lama.taps import Recorder
from lama.tokenizers import Tokenizer

SELF, ENCODER, DECODER, CROSS = ATTENTION_KINDS
SHADES = " .:-=+*#%@"
TALLEST = 10  # letters of a label above a column
LABELLED = 25  # most panels that have labels
STRONGEST = 3
MOMENTS = 5  # steps of a training shown in a row


@dataclass(frozen=True)
class Attention:
    """Patterns, queries and keys of one kind of attention for one text. Layers and heads count from 0."""

    kind: str
    queries: list[str]
    """Labels of the T rows: the tokens read or, for cross-attention, written."""
    keys: list[str]
    """Labels of the S columns."""
    patterns: Array
    """(n_layers, H, T, S), rows sum to 1."""
    q: Array
    """(n_layers, H, T, d_head)."""
    k: Array
    """(n_layers, H, S, d_head)."""
    scale: float | list[float] | None
    """The factor of q · k in a score, or a list with each layer's; None for other scores."""
    causal: bool
    """True if no query attends to later keys."""


def attention_of(
    model: Model, tokenizer: Tokenizer, tokens: Sequence[int], target: Sequence[int] = ()
) -> dict[str, Attention]:
    """Run a model on `tokens` (see `lama.data.inputs`); returns its attention by kind.

    An encoder-decoder reads `tokens` and writes `target`, ids without begin and end. Row t of its decoder's
    patterns predicts token t; the last row predicts the end. Raises LamaError for no tokens, more than the
    context holds, and a model without attention.
    """
    sites = model.attention_sites()
    if not sites:
        raise LamaError("the model has no attention layers")
    if not tokens:
        raise LamaError("the model must be given something to read; got no tokens")
    check_length([*tokens], model.config.context_length)
    record = Recorder("*attn.pattern", *(f"*attn.{part}" for part in ("q", "k", "rot_q", "rot_k")))
    read = token_labels(tokenizer, tokens)
    labels = {SELF: (read, read), ENCODER: (read, read)}
    if isinstance(model, Transformer):
        inputs = check_length([model.config.begin, *target], model.config.context_length)
        model(as_tokens(tokens), as_tokens(inputs), tap=record)
        seen = token_labels(tokenizer, inputs)
        labels[DECODER] = seen, seen
        labels[CROSS] = token_labels(tokenizer, [*target, model.config.end]), read
    else:
        model(as_tokens(tokens), tap=record)
    Tensor.realize(*record.values())

    def recorded(site: AttentionSite, part: str) -> Array:
        """Queries or keys as they enter the scores: rotated, and with keys repeated for each query head."""
        values = [record.get(f"{name}.rot_{part}", record[f"{name}.{part}"]) for name in site.names]
        found = np.stack([value.float().numpy()[0] for value in values])
        return found.repeat(site.modules[0].n_heads // found.shape[1], axis=1)

    found = {}
    for kind, site in sites.items():
        patterns, q, k = recorded(site, "pattern"), recorded(site, "q"), recorded(site, "k")
        found[kind] = Attention(kind, *labels[kind], patterns, q, k, _scale(site), site.causal)
    return found


def _scale(site: AttentionSite) -> float | list[float] | None:
    """One scale if all layers share it, else a list; None without scales."""
    each = (scale_of(module.similarity, module.d_head) for module in site.modules)
    scales = [scale for scale in each if scale is not None]
    return scales if len(set(scales)) > 1 else next(iter(scales), None)


def chosen_heads(
    model: Model, kind: str | None = None, layer: int | None = None, head: int | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The chosen kind of attention and its heads (layer, head); None chooses all layers or heads.

    Raises UsageError, listing the choices, where the model has no such kind, layer or head.
    """
    sites = model.attention_sites()
    if not sites:
        raise UsageError("the model has no attention layers")
    kind = kind or (CROSS if CROSS in sites else next(iter(sites)))
    if kind not in sites:
        raise UsageError(f"kind must be one that the model has: {' or '.join(sites)}; got {kind}")
    n_layers, n_heads = len(sites[kind].modules), sites[kind].modules[0].n_heads
    for name, value, n in (("layer", layer, n_layers), ("head", head, n_heads)):
        if value is not None and not 0 <= value < n:
            rule = f"{name} must be one of the model's {n}, counted from 0"
            raise UsageError(f"{rule}; got {value}. Choose 0 to {n - 1}")
    layers = range(n_layers) if layer is None else [layer]
    heads = range(n_heads) if head is None else [head]
    return kind, [*product(layers, heads)]


def panels(attention: Attention, heads: Sequence[tuple[int, int]]) -> list[HeatMap]:
    """A heat map for each of the heads; more than LABELLED of them have no labels."""
    many = len({layer for layer, _ in heads}) > 1 and len({head for _, head in heads}) > 1
    labels = attention.queries, attention.keys, "output" if attention.kind == CROSS else "token"
    found = []
    for layer, head in heads:
        title = f"{layer}.{head}" if many else f"layer {layer}, head {head}"
        values = attention.patterns[layer, head]
        found.append(_panel(values, title, *labels) if len(heads) <= LABELLED else _panel(values, title))
    return found


def _panel(
    values: Array, title: str, rows: Sequence[str] = (), columns: Sequence[str] = (), y: str = ""
) -> HeatMap:
    return HeatMap(values, title, rows, columns, y and "looks at", y, low=0, high=1, unit="attention")


def moment_panels(
    patterns: Array, steps: Sequence[int], heads: Sequence[str], labels: Sequence[str]
) -> list[list[HeatMap]]:
    """Heat maps of a recording (steps, heads, T, T): a row for each head, up to MOMENTS steps."""
    shown = np.unique(np.linspace(0, len(steps) - 1, MOMENTS).round().astype(int)).tolist()

    def panel(n: int, head: int) -> HeatMap:
        title = f"head {heads[head]}, step {steps[n]:,}"
        return _panel(patterns[n, head], title, labels, labels, "token")

    return [[panel(n, head) for n in shown] for head in range(len(heads))]


def summary(attention: Attention, heads: Sequence[tuple[int, int]]) -> str:
    """A line for each head: mean attention to the first token, the token itself and the one before it.

    The means leave out the first two rows. The STRONGEST links to other tokens follow.
    """
    T, S = attention.patterns.shape[2:]
    near = attention.kind != CROSS
    shown = "first   itself   before   strongest other links" if near else "strongest links"
    lines = [f"{'head':<7}{shown}"]
    for layer, head in heads:
        pattern = attention.patterns[layer, head].copy()
        shares, links = "", []
        if near:
            t = np.arange(min(2, T - 1), T)
            columns = [np.zeros_like(t), t, np.maximum(t - 1, 0)]
            shares = "   ".join(f"{pattern[t, column].mean():6.2f}" for column in columns) + "    "
            pattern[:, 0] = 0
            pattern[np.arange(T), np.arange(T)] = pattern[np.arange(1, T), np.arange(T - 1)] = 0
        for i in np.argsort(-pattern, axis=None, kind="stable")[:STRONGEST]:
            row, column = divmod(int(i), S)
            if (weight := pattern[row, column]) > 0:
                links.append(f"{attention.queries[row]} → {attention.keys[column]} {weight:.2f}")
        lines.append(f"{layer}.{head:<5}{shares}{',  '.join(links)}".rstrip())
    return "\n".join(lines)


def draw_pattern(pattern: Array, rows: Sequence[str], columns: Sequence[str], gap: str = " ") -> str:
    """Draw a pattern (T, S) in characters, darker for more attention; column labels read downwards."""
    width, height = max(map(len, rows), default=1), min(TALLEST, max(map(len, columns), default=1))
    cells = np.minimum((pattern * len(SHADES)).astype(int), len(SHADES) - 1)
    tops = [(label if len(label) <= height else f"{label[: height - 1]}…").rjust(height) for label in columns]
    lines = [" " * (width + 2) + gap.join(top[i] for top in tops) for i in range(height)]
    for row, shades in zip(rows, cells, strict=False):
        lines.append(f"{row:>{width}}  {gap.join(SHADES[i] for i in shades[: len(columns)])}")
    return "\n".join(line.rstrip() for line in lines)
