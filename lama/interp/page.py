"""Attention as one page of HTML that any browser opens without a network: head, matrix, model and neuron view. A string, for any output.

Weights are whole numbers of 1/65535, queries and keys of 1/127 of each vector's largest component, packed and in base64, a piece for
each layer, which the page unpacks when it is looked at. The page itself is lama/interp/views/.
"""

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lama.errors import LamaError
from lama.interp.attention import CROSS, DECODER, ENCODER, ROWS, SELF, Attention

ONE = 65535  # a weight of 1, as it is stored
LARGEST = 100e6  # bytes of numbers in a page
NAMES = {SELF: "self-attention", ENCODER: "the encoder's", DECODER: "the decoder's", CROSS: "decoder to encoder"}
OFFLINE = "Weights are rounded to 1/65,535. Nothing is loaded from anywhere: the file can be copied, sent and opened offline."
ROUNDED = (
    f"{OFFLINE} The components of queries and keys are rounded to 1/127 of each vector's largest; the neuron view computes its scores from "
    "these."
)


def attention_page(
    attention: Mapping[str, Attention], about: str, kind: str, layer: int | None = None, head: int | None = None, text: str = ""
) -> str:
    """The page of `lama.interp.attention.attention_of`'s findings, opened at `kind`, `layer` and `head`; `about` says of what model.

    Raises LamaError where it would be too large.
    """
    size = sum(each.patterns.size * (1 if each.causal else 2) + each.q.size + each.k.size for each in attention.values())
    if size > LARGEST:
        shape = next(iter(attention.values())).patterns.shape
        raise LamaError(
            f"a page must hold at most {LARGEST / 1e6:.0f} MB of numbers; got {size / 1e6:.0f} MB for {shape[3]} tokens and {shape[0]} x "
            f"{shape[1]} heads. Shorten the text, or write a picture: --out FILE.png"
        )
    chunks: dict[str, bytes] = {}
    for i, each in enumerate(attention.values()):
        for n in range(len(each.patterns)):
            chunks[f"p-{i}-{n}"] = packed_weights(each.patterns[n], each.causal)
            if each.scale is not None:
                chunks[f"v-{i}-{n}"] = packed_vectors(np.concatenate([each.q[n], each.k[n]], axis=1))
    start = {"view": "head", "kind": list(attention).index(kind), "layer": layer or 0, "head": head}
    meta = {"views": ["head", "matrix", "model", "neuron"], "kinds": [_about(each) for each in attention.values()], "start": start}
    return page("Attention", about, text, meta | {"recorded": None, "notes": ROUNDED}, chunks)


def training_page(
    patterns: np.ndarray,
    steps: Sequence[int],
    losses: Sequence[float | None],
    heads: Sequence[str],
    labels: Sequence[str],
    about: str,
    text: str,
) -> str:
    """The page of a recording, patterns (steps, heads, T, T) that look at nothing ahead: a slider goes through the steps.

    Raises LamaError where it would be too large.
    """
    if patterns.size > LARGEST:
        raise LamaError(f"a page must hold at most {LARGEST / 1e6:.0f} MB of numbers; got {patterns.size / 1e6:.0f} MB. Record fewer heads")
    recorded = {"steps": [*steps], "losses": [*losses], "heads": [*heads], "labels": [*labels]}
    meta = {"views": ["training"], "kinds": [], "start": {"view": "training", "kind": 0, "layer": 0, "head": None}, "recorded": recorded}
    chunks = {"r": packed_weights(patterns.reshape(-1, *patterns.shape[2:]), causal=True)}
    return page("Attention while learning", about, text, meta | {"notes": OFFLINE}, chunks)


def _about(each: Attention) -> dict[str, Any]:
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
        "rows": ROWS[each.kind],
        "columns": "looks at",
        "verb": "looks at" if each.kind != CROSS else "is written looking at",
    }


def packed_weights(patterns: np.ndarray, causal: bool) -> bytes:
    """Patterns (n, T, S) as 16-bit numbers, row by row, what is ahead of a causal query left out: all high bytes, then all low ones."""
    numbers = np.rint(patterns * ONE).astype(np.uint16)
    numbers = numbers[:, np.tri(*numbers.shape[1:]) > 0] if causal else numbers
    return (numbers >> 8).astype(np.uint8).tobytes() + (numbers & 255).astype(np.uint8).tobytes()


def packed_vectors(vectors: np.ndarray) -> bytes:
    """Vectors (H, n, d) as 8-bit numbers, then a float32 scale for each of them."""
    scales = np.maximum(np.abs(vectors).max(-1, keepdims=True), 1e-30) / 127
    return np.rint(vectors / scales).astype(np.int8).tobytes() + scales.astype("<f4").tobytes()


def page(heading: str, about: str, text: str, meta: Mapping[str, Any], chunks: Mapping[str, bytes]) -> str:
    """The page, with what it shows. Whatever a token says, it stays text."""
    parts = {
        "title": html.escape(f"{heading}: {text}" if text else heading),
        "heading": html.escape(f"{heading} · {text}" if text else heading),
        "about": html.escape(about),
        "style": _file("page.css"),
        "script": _file("page.js"),
        "meta": json.dumps(meta).replace("<", "\\u003c"),
        "chunks": "\n".join(f'<script type="text/plain" id="{name}">{_packed(content)}</script>' for name, content in chunks.items()),
    }
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], _file("page.html"))


def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "views" / name).read_text(encoding="utf-8").rstrip("\n")
