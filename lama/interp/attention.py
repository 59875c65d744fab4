"""Which tokens a model looks at while it reads a text: the patterns of all its heads, with labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.attention import MultiHeadAttention
from lama.data.inputs import check_length
from lama.errors import LamaError, UsageError
from lama.interp.labels import token_labels
from lama.interp.pictures import HeatMap
from lama.models.kinds import kind_of
from lama.models.transformer import Transformer
from lama.taps import Recorder

SELF, ENCODER, DECODER, CROSS = KINDS = ("self", "encoder", "decoder", "cross")
"""Self-attention of a model of one stack; of an encoder-decoder the encoder's, the decoder's, and the decoder's to the encoder."""
ROWS = {SELF: "token", ENCODER: "token", DECODER: "token", CROSS: "written"}
SHADES = " .:-=+*#%@"
TALLEST = 10  # letters of a label above a column
LABELLED = 25  # panels at most
STRONGEST = 3
MOMENTS = 5  # of a training beside each other


@dataclass(frozen=True)
class Attention:
    """What the heads of one kind of attention do with one text, layers and heads as they are numbered from 0."""

    kind: str
    queries: list[str]
    """Labels of the T rows of a pattern; of cross-attention the tokens that are written there, else those that are read."""
    keys: list[str]
    """Labels of the S columns."""
    patterns: np.ndarray
    """(n_layers, H, T, S), rows sum to 1."""
    q: np.ndarray
    """(n_layers, H, T, d_head)."""
    k: np.ndarray
    """(n_layers, H, S, d_head)."""
    scale: float | list[float] | None
    """A score is q · k times this, in a list that of its layer; None for similarity functions that are not such a product."""
    causal: bool
    """Whether no query looks at later keys."""


@dataclass(frozen=True)
class Place:
    """Where a model has attention of one kind: the names that its taps go by, and the modules."""

    taps: list[str]
    modules: list[MultiHeadAttention]
    causal: bool


def places(model: Any) -> dict[str, Place]:
    """The kinds of attention that a model has, and where. Raises ValueError for what is no model of `lama.models.kinds`."""
    if kind_of(model) != "transformer":
        causal = kind_of(model) == "gpt"
        return _place(SELF, "blocks.{}.attn", [block.attn for block in (model if causal else model.encoder).blocks], causal)
    return (
        _place(ENCODER, "encoder.blocks.{}.attn", [block.attn for block in model.encoder.blocks], False)
        | _place(DECODER, "decoder.blocks.{}.attn", [block.attn for block in model.decoder.blocks], True)
        | _place(CROSS, "decoder.blocks.{}.cross_attn", [block.cross_attn for block in model.decoder.blocks], False)
    )


def _place(kind: str, name: str, modules: Sequence[Any], causal: bool) -> dict[str, Place]:
    return {kind: Place([name.format(i) for i in range(len(modules))], list(modules), causal)} if modules else {}


def attention_of(model: Any, tokenizer: Any, tokens: Sequence[int], target: Sequence[int] = ()) -> dict[str, Attention]:
    """The attention of a model of any kind that reads `tokens` (see `lama.data.inputs`), by kind.

    An encoder-decoder reads `tokens` as its source and writes `target`, ids without begin and end; row t of its decoder's
    patterns belongs to the prediction of token t, the last one to that of the end. Raises LamaError for more tokens than the
    context has, and for a model without attention.
    """
    where = places(model)
    if not where:
        raise LamaError("the model must have attention; got one without layers")
    if not tokens:
        raise LamaError("the model must be given something to read; got no tokens")
    check_length([*tokens], model.config.context_length)
    record = Recorder(*(f"{tap}.{name}" for place in where.values() for tap in place.taps for name in ("pattern", "q", "k")))
    inputs = [list(tokens)]
    if isinstance(model, Transformer):
        inputs.append([model.config.begin, *target])
        check_length(inputs[1], model.config.context_length)
    model(*(Tensor(np.array([ids], np.int32)) for ids in inputs), tap=record)
    read = [token_labels(tokenizer, ids) for ids in inputs]
    written = token_labels(tokenizer, [*target, model.config.end]) if isinstance(model, Transformer) else []
    labels = {SELF: (read[0], read[0]), ENCODER: (read[0], read[0]), DECODER: (read[-1], read[-1]), CROSS: (written, read[0])}
    Tensor.realize(*record.values())

    def attention(kind: str, place: Place) -> Attention:
        patterns, q, k = (np.stack([record[f"{tap}.{name}"].float().numpy()[0] for tap in place.taps]) for name in ("pattern", "q", "k"))
        scales = [module.scale for module in place.modules if module.scale is not None]
        scale = scales if len(set(scales)) > 1 else place.modules[0].scale
        return Attention(kind, *labels[kind], patterns, q, k, scale, place.causal)

    return {kind: attention(kind, place) for kind, place in where.items()}


def chosen_heads(
    model: Any, kind: str | None = None, layer: int | None = None, head: int | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The kind of attention that is meant, and its heads as (layer, head): one, a layer's, that of every layer, or all.

    Raises UsageError where the model has no such kind, layer or head, saying what there is.
    """
    where = places(model)
    kind = kind or (CROSS if CROSS in where else next(iter(where), SELF))
    if kind not in where:
        if not where:
            raise UsageError("the model must have attention; got one without layers")
        raise UsageError(f"kind must be one that the model has: {' or '.join(where)}; got {kind}")
    n_layers, n_heads = len(where[kind].modules), where[kind].modules[0].n_heads
    for name, value, n in (("layer", layer, n_layers), ("head", head, n_heads)):
        if value is not None and not 0 <= value < n:
            raise UsageError(f"{name} must be one of the model's {n}, counted from 0; got {value}. Choose 0 to {n - 1}")
    layers = range(n_layers) if layer is None else [layer]
    return kind, [(i, j) for i in layers for j in (range(n_heads) if head is None else [head])]


def panels(attention: Attention, heads: Sequence[tuple[int, int]]) -> list[HeatMap]:
    """A heat map for each of the heads; with more than LABELLED of them without labels."""
    with_labels = len(heads) <= LABELLED
    n_layers, n_heads = len({layer for layer, _ in heads}), len({head for _, head in heads})
    rows, columns, x, y = (attention.queries, attention.keys, "looks at", ROWS[attention.kind]) if with_labels else ([], [], "", "")
    found = []
    for layer, head in heads:
        title = f"{layer}.{head}" if n_layers > 1 and n_heads > 1 else f"layer {layer}, head {head}"
        found.append(HeatMap(attention.patterns[layer, head], title, rows, columns, x, y, low=0, high=1, unit="attention"))
    return found


def moment_panels(patterns: np.ndarray, steps: Sequence[int], heads: Sequence[str], labels: Sequence[str]) -> list[list[HeatMap]]:
    """Of a recording, patterns (steps, heads, T, T): a row of heat maps for each head, at up to MOMENTS steps, the ends too."""
    shown = np.unique(np.linspace(0, len(steps) - 1, MOMENTS).round().astype(int)).tolist()
    axes = (labels, labels, "looks at", "token")

    def panel(n: int, head: int) -> HeatMap:
        return HeatMap(patterns[n, head], f"head {heads[head]}, step {steps[n]:,}", *axes, low=0, high=1, unit="attention")

    return [[panel(n, head) for n in shown] for head in range(len(heads))]


def summary(attention: Attention, heads: Sequence[tuple[int, int]]) -> str:
    """A line for each head: the shares of its attention that go to the first token, to the token itself and to the one before it, on
    average over the rows from the third on; and of all else the STRONGEST links."""
    T, S = attention.patterns.shape[2:]
    near = attention.kind != CROSS
    lines = [f"{'head':<7}{'first   itself   before   ' if near else ''}strongest {'other ' if near else ''}links"]
    for layer, head in heads:
        pattern = attention.patterns[layer, head].copy()
        shares = ""
        if near:
            t = np.arange(min(2, T - 1), T)
            columns = [np.zeros_like(t), t, np.maximum(t - 1, 0)]
            shares = "   ".join(f"{pattern[t, column].mean():6.2f}" for column in columns) + "    "
            pattern[:, 0] = 0
            pattern[np.arange(T), np.arange(T)] = pattern[np.arange(1, T), np.arange(T - 1)] = 0
        best = np.argsort(-pattern, axis=None, kind="stable")[:STRONGEST]
        links = (
            f"{attention.queries[i // S]} → {attention.keys[i % S]} {pattern.flat[i]:.2f}" for i in map(int, best) if pattern.flat[i] > 0
        )
        lines.append(f"{layer}.{head:<5}{shares}{',  '.join(links)}".rstrip())
    return "\n".join(lines)


def draw_pattern(pattern: np.ndarray, rows: Sequence[str], columns: Sequence[str], gap: str = " ") -> str:
    """One pattern (T, S) in characters, darker where more of a row's attention goes; the columns' labels are read downwards."""
    width, height = max(map(len, rows), default=1), min(TALLEST, max(map(len, columns), default=1))
    cells = np.minimum((pattern * len(SHADES)).astype(int), len(SHADES) - 1)
    tops = [(label if len(label) <= height else f"{label[: height - 1]}…").rjust(height) for label in columns]
    lines = [" " * (width + 2) + gap.join(top[i] for top in tops) for i in range(height)]
    lines += [f"{row:>{width}}  {gap.join(SHADES[i] for i in of_row[: len(columns)])}" for row, of_row in zip(rows, cells, strict=False)]
    return "\n".join(line.rstrip() for line in lines)
