"""Attention as one offline HTML page, made of the files in lama/interp/views/.

Weights are 16-bit multiples of 1/65535; queries and keys are 8-bit multiples of 1/127 of each vector's
largest component. They are compressed and in base64, a piece for each layer.
"""

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lama.errors import LamaError
from lama.interp.attention import CROSS, DECODER, ENCODER, SELF, Attention
from lama.shapes import Array

Meta: TypeAlias = Mapping[str, object]
"""Values for the page's script."""

ONE = 65535  # a weight of 1
LARGEST = 100e6  # bytes of numbers in a page
SCRIPTS = ("numbers.js", "views.js", "page.js")
NAMES = {
    SELF: "self-attention",
    ENCODER: "the encoder's",
    DECODER: "the decoder's",
    CROSS: "decoder to encoder",
}
OFFLINE = (
    "Weights are rounded to 1/65,535. The file loads nothing else: it can be copied, sent and opened offline."
)
ROUNDED = (
    f"{OFFLINE} The components of queries and keys are rounded to 1/127 of each vector's largest; the neuron "
    "view computes its scores from these."
)


def attention_page(
    attention: Mapping[str, Attention],
    about: str,
    kind: str,
    layer: int | None = None,
    head: int | None = None,
    text: str = "",
) -> str:
    """The page of `attention_of`, opened at `kind`, `layer` and `head`; `about` describes the model.

    Raises LamaError as `check_size`.
    """
    size = 0
    for each in attention.values():
        size += each.patterns.size * (1 if each.causal else 2) + each.q.size + each.k.size
    n_layers, n_heads, _, n_tokens = next(iter(attention.values())).patterns.shape
    advice = "Shorten the text, or write a picture: --out FILE.png"
    check_size(size, f" for {n_tokens} tokens and {n_layers} x {n_heads} heads. {advice}")
    chunks: dict[str, bytes] = {}
    for i, each in enumerate(attention.values()):
        for n in range(len(each.patterns)):
            chunks[f"p-{i}-{n}"] = packed_weights(each.patterns[n], each.causal)
            if each.scale is not None:
                chunks[f"v-{i}-{n}"] = packed_vectors(np.concatenate([each.q[n], each.k[n]], axis=1))
    start = {"view": "head", "kind": list(attention).index(kind), "layer": layer or 0, "head": head}
    meta = {"kinds": [_about(each) for each in attention.values()], "start": start, "notes": ROUNDED}
    return page("Attention", about, text, meta, chunks)


def training_page(
    patterns: Array,
    steps: Sequence[int],
    losses: Sequence[float | None],
    heads: Sequence[str],
    labels: Sequence[str],
    about: str,
    text: str,
) -> str:
    """The page of a recording, causal patterns (steps, heads, T, T). Raises LamaError as `check_size`."""
    check_size(patterns.size, ". Record fewer heads")
    recorded = {"steps": [*steps], "losses": [*losses], "heads": [*heads], "labels": [*labels]}
    meta = {"kinds": [], "recorded": recorded, "start": {"view": "training"}, "notes": OFFLINE}
    chunks = {"r": packed_weights(patterns.reshape(-1, *patterns.shape[2:]), causal=True)}
    return page("Attention during training", about, text, meta, chunks)


def check_size(size: int, advice: str) -> None:
    """Raises LamaError, ending with `advice`, for more than LARGEST bytes of numbers."""
    if size > LARGEST:
        most, got = f"{LARGEST / 1e6:.0f} MB", f"{size / 1e6:.0f} MB"
        raise LamaError(f"a page must hold at most {most} of numbers; got {got}{advice}")


def _about(each: Attention) -> Meta:
    n_layers, n_heads, _, d = each.q.shape
    return {
        "name": NAMES[each.kind],
        "queries": each.queries,
        "keys": each.keys,
        "layers": n_layers,
        "heads": n_heads,
        "d": d,
        "scale": each.scale,
        "causal": each.causal,
        "same": each.kind != CROSS,
    }


def packed_weights(patterns: Array, causal: bool) -> bytes:
    """Patterns (n, T, S) as 16-bit numbers by row: all high bytes, then all low bytes.

    Causal patterns leave out the keys after each query.
    """
    numbers = np.rint(patterns * ONE).astype(">u2")
    numbers = numbers[:, np.tri(*numbers.shape[1:]) > 0] if causal else numbers
    return np.frombuffer(numbers.tobytes(), np.uint8).reshape(-1, 2).T.tobytes()


def packed_vectors(vectors: Array) -> bytes:
    """Vectors (H, n, d) as 8-bit numbers, then a float32 scale for each vector."""
    scales = np.maximum(np.abs(vectors).max(-1, keepdims=True), 1e-30) / 127
    return np.rint(vectors / scales).astype(np.int8).tobytes() + scales.astype("<f4").tobytes()


def page(heading: str, about: str, text: str, meta: Meta, chunks: Mapping[str, bytes]) -> str:
    """Fill the page with its data, escaped."""
    data = []
    for name, content in chunks.items():
        packed = base64.b64encode(zlib.compress(content)).decode()
        data.append(f'<script type="text/plain" id="{name}">{packed}</script>')
    parts = {
        "title": html.escape(f"{heading}: {text}" if text else heading),
        "heading": html.escape(f"{heading} · {text}" if text else heading),
        "about": html.escape(about),
        "style": _file("page.css"),
        "script": "\n\n".join(map(_file, SCRIPTS)),
        "meta": json.dumps(meta).replace("<", "\\u003c"),
        "chunks": "\n".join(data),
    }
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], _file("page.html"))


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "views" / name).read_text(encoding="utf-8").rstrip("\n")
