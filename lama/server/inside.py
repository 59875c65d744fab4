"""The inside of a model over HTTP: activations by name, the logit lens and attention.

Each function takes a model, a tokenizer and a request's JSON object. It returns an answer with NumPy arrays
in it, which `to_json` and `to_npz` write. It runs the model, so call it in the engine's thread. The model
computes a block at a time: memory holds the chosen activations and those of one block. Blocks after the last
chosen one are not computed.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from tinygrad import Tensor

from lama.errors import LamaError, did_you_mean, quoted
from lama.interp.record import as_tokens, short_name
from lama.models.gpt import GPT
from lama.server.fields import BadField, Body, boolean, choice, indices, integer, prompt_tokens, texts
from lama.server.steps import text_stream
from lama.shapes import Array
from lama.taps import Recorder
from lama.tokenizers import Tokenizer

MOST_TOKENS = 512
MOST_BYTES = 64_000_000  # of an answer
NUMBER = {"json": 17, "npz": 4}  # bytes: -1.23456789e-10 and a comma, at most; float32
MOST_PATTERNS = 100
AT_ONCE = 16  # positions that are unembedded together
SQUARE = ("scores", "pattern")  # activations whose last axis is the text

Answer: TypeAlias = dict[str, object]
"""A JSON object that may hold NumPy arrays."""
Names: TypeAlias = dict[str, tuple[int, ...]]
_names: WeakKeyDictionary[GPT, Names] = WeakKeyDictionary()


def activations(model: GPT) -> Names:
    """Each activation's name and shape for a text of one token, without the batch's axis."""
    if model not in _names:
        record = Recorder()
        model(as_tokens([0]), tap=record)  # only for the shapes: nothing is computed
        shapes = {name: tuple(map(int, value.shape)) for name, value in record.items()}
        _names[model] = {n: shape if n == "pos_embed" else shape[1:] for n, shape in shapes.items()}
    return _names[model]


@dataclass(frozen=True)
class Selection:
    """Chosen activations; None chooses all layers, heads or positions."""

    names: Sequence[str]
    heads: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    """Rows of each activation: the queries of scores and patterns. Negative ones count from the end."""

    def shape(self, name: str, one: tuple[int, ...], n: int) -> tuple[int, ...]:
        """The shape of an activation's chosen part for n tokens; `one` is its whole shape for one token."""
        rows = n if self.positions is None else len(self.positions)
        last = n if name.endswith(SQUARE) else one[-1]
        if len(one) < 3:
            return rows, last
        return one[0] if self.heads is None else len(self.heads), rows, last

    def part(self, name: str, value: Array, n: int, n_heads: int) -> Array:
        """The chosen part of an activation (..., T, d), in float32; positions from n on are padding."""
        value = value[..., :n, :n] if name.endswith(SQUARE) else value[..., :n, :]
        if self.heads is not None and value.ndim == 3:  # keys and values may have fewer heads
            value = value[[head * len(value) // n_heads for head in self.heads]]
        if self.positions is not None:
            value = value[..., list(self.positions), :]
        return np.array(value, np.float32)


def run(model: GPT, tokens: Sequence[int], chosen: Selection) -> dict[str, Array]:
    """The chosen activations for these tokens, in float32, without the batch's axis.

    Axes are those of the taps: (T, d_model), (H, T, d_head), (H, T, S). `heads` are query heads; of keys and
    values, the head that each query head reads is returned.
    """
    n, n_heads, names = len(tokens), model.config.n_heads, set(chosen.names)
    found: dict[str, Array] = {}
    for x, taps in text_stream(model, tokens, names):  # noqa: B007  (the last x is used below)
        found |= {name: chosen.part(name, array, n, n_heads) for name, array in taps.items()}
        if found.keys() == names:
            return found
    rows = chosen.part("", normalised(model, x), n, n_heads)
    if "ln_final.normalized" in names:
        found["ln_final.normalized"] = rows
    if "logits" in names:
        found["logits"] = unembedded(model, rows)
    return found


def normalised(model: GPT, x: Array) -> Array:
    """The final norm of rows (n, d_model) of the residual stream, in float32."""
    rows: Array = model.normalised(Tensor(x[None], device=model.embed.weight.device)).float().numpy()
    return rows[0]


def unembedded(model: GPT, rows: Array) -> Array:
    """The logits of rows of the normalised stream: (n, d_model) -> (n, vocab_size), float32."""
    out = np.empty((len(rows), model.config.vocab_size), np.float32)
    for start in range(0, len(rows), AT_ONCE):
        some = np.zeros((1, AT_ONCE, rows.shape[1]), np.float32)
        part = rows[start : start + AT_ONCE]
        some[0, : len(part)] = part
        logits = model.logits(Tensor(some, device=model.embed.weight.device))
        out[start : start + len(part)] = logits.float().numpy()[0, : len(part)]
    return out


def internals(model: GPT, tokenizer: Tokenizer, body: Body) -> Answer:
    """The answer to /v1/internals: {"tokens", "texts", "taps": {name: {"shape", "data"}}}.

    Raises BadField.
    """
    tokens, _ = read_text(model, tokenizer, body)
    arrays = run(model, tokens, read_selection(model, body, len(tokens)))
    shapes = {name: {"shape": list(array.shape), "data": array} for name, array in arrays.items()}
    return {"tokens": tokens, "texts": pieces(tokenizer, tokens), "taps": shapes}


def read_text(model: GPT, tokenizer: Tokenizer, body: Body) -> tuple[list[int], int]:
    """The prompt's tokens, and the number of tokens to generate before activations are recorded.

    Raises BadField, also if the answer could become too large.
    """
    most = min(MOST_TOKENS, model.config.context_length)
    tokens = prompt_tokens(model, tokenizer, body, most)
    new = integer(body, "max_tokens", 0, most - len(tokens), 0)
    read_selection(model, body, len(tokens) + new)
    return tokens, new


def read_selection(model: GPT, body: Body, n: int) -> Selection:
    """The selection of a request for a text of n tokens. Raises BadField, for its size too."""
    names, c = activations(model), model.config
    layers = indices(body, "layers", c.n_layers)
    kept = [name for name in names if layers is None or _layer(name) in (None, *layers)]
    wanted: dict[str, None] = {}
    for pattern in texts(body, "taps", MOST_PATTERNS):
        matched = [name for name in kept if fnmatchcase(name, short_name(pattern))]
        if not matched:
            hint = did_you_mean(short_name(pattern), kept)
            rule = "taps must match the name of an activation"
            raise BadField("taps", f"{rule}; got {quoted(pattern, 80)}{hint}")
        wanted |= dict.fromkeys(matched)
    heads = indices(body, "heads", c.n_heads)
    chosen = Selection(list(wanted), heads, indices(body, "positions", n))
    kind = choice(body, "format", ("json", "npz"))
    check_size(sum(math.prod(chosen.shape(name, names[name], n)) for name in wanted), kind)
    return chosen


def check_size(numbers: int, kind: str) -> None:
    """Raise BadField for an answer of too many numbers, before any memory is taken."""
    size = numbers * NUMBER[kind]
    if size > MOST_BYTES:
        advice = "Choose layers, heads or positions, or shorten the prompt"
        advice += ", or ask for format npz" if kind == "json" else ""
        rule = f"an answer must have at most {MOST_BYTES // 1_000_000} MB"
        raise BadField("taps", f"{rule}; got {size / 1e6:,.0f} MB of numbers. {advice}")


def _layer(name: str) -> int | None:
    """The layer of an activation; None outside the blocks."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def lens(model: GPT, tokenizer: Tokenizer, body: Body) -> Answer:
    """The answer to /v1/lens: predictions after one position, stage by stage, as in `lama lens`.

    {"position", "tokens", "texts", "layers": [{"name", "top": [{"token", "text", "probability"}],
    "answer_probability", "answer_rank"}]}; the last two with an `answer`. Raises BadField.
    """
    c = model.config
    tokens = prompt_tokens(model, tokenizer, body, min(MOST_TOKENS, c.context_length))
    position = _position(body, len(tokens))
    answer = integer(body, "answer", 0, c.vocab_size - 1, -1)
    k = integer(body, "k", 1, min(100, c.vocab_size), 5)
    layers: list[Answer] = []
    stages = np.stack([x[position] for x, _ in text_stream(model, tokens)])
    logits = unembedded(model, normalised(model, stages))
    if not np.isfinite(logits).all():
        raise LamaError("logits must be finite; got others. Try --dtype float32")
    for name, at in zip(["embed", *_layers("resid_post", range(c.n_layers))], logits, strict=True):
        probabilities = np.exp(at - at.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-at, kind="stable")[:k].tolist()
        top = [
            {"token": token, "text": text, "probability": float(probabilities[token])}
            for token, text in zip(best, pieces(tokenizer, best), strict=True)
        ]
        layers.append({"name": name, "top": top})
        if answer >= 0:
            layers[-1]["answer_probability"] = float(probabilities[answer])
            layers[-1]["answer_rank"] = 1 + int((at > at[answer]).sum())
    return {"position": position, "tokens": tokens, "texts": pieces(tokenizer, tokens), "layers": layers}


def attention(model: GPT, tokenizer: Tokenizer, body: Body) -> Answer:
    """The answer to /v1/attention: the weights of each head for one query, or with `full` for all.

    {"position", "tokens", "texts", "layers": [{"layer", "heads": [{"head", "weights"}]}]}. `weights` (S,)
    end with the query itself; with `full` they are (T, S), and `position` is null. Raises BadField.
    """
    c = model.config
    if not c.n_layers:
        raise BadField("layers", "the model has no attention layers")
    tokens = prompt_tokens(model, tokenizer, body, min(MOST_TOKENS, c.context_length))
    full = boolean(body, "full")
    if full and body.get("position") is not None:
        raise BadField("position", "position must be absent with full; leave out one of them")
    position = _position(body, len(tokens))
    layers = indices(body, "layers", c.n_layers) or list(range(c.n_layers))
    heads = indices(body, "heads", c.n_heads) or list(range(c.n_heads))
    rows = len(tokens) if full else 1
    check_size(len(layers) * len(heads) * rows * len(tokens), "json")
    names = _layers("attn.pattern", layers)
    found = run(model, tokens, Selection(names, heads, None if full else [position]))
    patterns = [found[name] if full else found[name][:, 0, : position + 1] for name in names]
    shown = [
        {"layer": layer, "heads": [{"head": h, "weights": each[i]} for i, h in enumerate(heads)]}
        for layer, each in zip(layers, patterns, strict=True)
    ]
    text = {"tokens": tokens, "texts": pieces(tokenizer, tokens)}
    return {"position": None if full else position, **text, "layers": shown}


def _layers(name: str, layers: Iterable[int]) -> list[str]:
    return [f"blocks.{layer}.{name}" for layer in layers]


def _position(body: Body, n: int) -> int:
    """The field `position` of a text of n tokens, by default the last. Raises BadField."""
    return integer(body, "position", -n, n - 1, n - 1) % n


def pieces(tokenizer: Tokenizer, tokens: Collection[int]) -> list[str]:
    """The text of each token alone, with U+FFFD for parts of characters; `<50300>` for an unused id."""
    return [tokenizer.decode([i]) if i < tokenizer.vocab_size else f"<{i}>" for i in tokens]


def to_json(answer: object) -> bytes:
    """An answer as JSON. Numbers of arrays have the digits that float32 needs; infinite ones are null."""
    return "".join(_json(answer)).encode()


def _json(value: object) -> list[str]:
    """Parts of a JSON text."""
    if isinstance(value, np.ndarray):
        return [_array(value)]
    if isinstance(value, Mapping):
        parts, ends = [[json.dumps(key), ":", *_json(each)] for key, each in value.items()], "{}"
    elif isinstance(value, list):
        parts, ends = [_json(each) for each in value], "[]"
    else:
        return [json.dumps(value, ensure_ascii=False)]
    joined = [text for part in parts for text in (",", *part)]
    return [ends[0], *joined[1:], ends[1]]


def _array(array: Array) -> str:
    if array.ndim > 1:
        return f"[{','.join(map(_array, array))}]"
    numbers = [f"{number:.9g}" for number in array.tolist()]
    if not np.isfinite(array).all():
        numbers = [text if text.lstrip("-")[0].isdigit() else "null" for text in numbers]
    return f"[{','.join(numbers)}]"


def to_npz(answer: Answer) -> bytes:
    """The arrays of an answer of `internals`, by name, and its `tokens`, as NumPy's .npz."""
    taps, file = answer["taps"], BytesIO()
    assert isinstance(taps, Mapping)
    arrays = {name: np.asarray(fields["data"]) for name, fields in taps.items()}
    np.savez(file, **{"tokens": np.array(answer["tokens"], np.int32), **arrays})  # type: ignore[arg-type]
    return file.getvalue()
