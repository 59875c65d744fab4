"""Attention of some heads on one sentence, kept at intervals while a model learns: recording.jsonl in the run's folder.

Its first line says of what: {"text", "tokens", "heads"}; each line after it is a moment: {"step", "loss", "weights"}, the weights as whole
numbers of 1/65535, head by head and row by row without what is ahead, little-endian, deflated and in base64.
"""

import base64
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.checkpoints.atomic import atomic_write
from lama.data.inputs import check_length
from lama.errors import LamaError, UsageError, quoted
from lama.files import checked, field, parse_json_lines, quoted_path, read_file
from lama.jit import capture_at_once
from lama.models.gpt import GPT, GPTConfig
from lama.taps import Recorder
from lama.tokenizers import Tokenizer
from lama.training.config import RunConfig

ONE = 65535  # a weight of 1, as it is stored
MOMENTS = 60  # of a run, where record_every is not given
LARGEST = 1 << 30  # bytes of a recording, and of the weights in it
HEADS = 12  # at most, where record_heads is not given: those of the first layers

Head = tuple[int, int]


def what_to_record(config: RunConfig, tokenizer: Tokenizer, shape: GPTConfig) -> tuple[list[int], list[Head]]:
    """The sentence's tokens and the heads (layer, head) that the settings name. Raises LamaError for a sentence that does not fit."""
    if not config.record:
        if config.record_heads or config.record_every:
            raise UsageError("record_heads and record_every must be given with record; got no sentence. Add --record TEXT")
        return [], []
    heads = [_parse(name, shape) for name in config.record_heads]
    everywhere = [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    return check_length(tokenizer.encode(config.record), config.context_length), heads or everywhere[:HEADS]


def _parse(name: str, shape: GPTConfig) -> Head:
    layer, dot, head = name.partition(".")
    numbers = dot and layer.isdecimal() and head.isdecimal() and max(len(layer), len(head)) < 10
    if not (numbers and int(layer) < shape.n_layers and int(head) < shape.n_heads):
        raise UsageError(
            f"record_heads must be LAYER.HEAD of the model's {shape.n_layers} x {shape.n_heads}, counted from 0; got {quoted(name)}. "
            f"Choose 0.0 to {shape.n_layers - 1}.{shape.n_heads - 1}"
        )
    return int(layer), int(head)


@dataclass(frozen=True)
class Recorded:
    """A recording, as it was read back."""

    text: str
    tokens: list[int]
    heads: list[str]
    """`0.1` for each: layer and head."""
    steps: list[int]
    losses: list[float | None]
    """Loss of the batch of each step, nats per token; None before the first."""
    patterns: np.ndarray
    """(steps, heads, T, T)."""


class Recording:
    """Takes the patterns of a GPT that learns; changes nothing in it. What it computes is captured once."""

    def __init__(self, path: Path, model: GPT, config: RunConfig, tokenizer: Tokenizer):
        self.path, self.config = path, config
        tokens, self.heads = what_to_record(config, tokenizer, model.config)
        self.tokens, self.every = tokens, config.record_every or max(1, config.steps // MOMENTS)
        names = {layer: f"blocks.{layer}.attn.pattern" for layer, _ in self.heads}

        def look(ids: Tensor) -> Tensor:
            record = Recorder(*names.values())
            model(ids, tap=record)
            return Tensor.stack(*(record[names[layer]][0, head] for layer, head in self.heads)).float().realize()

        self._look = capture_at_once(look)

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.config.steps

    def begin(self) -> None:
        """The first line, and the untrained model. Raises LamaError if it cannot be written."""
        self._write([])
        self.take(0, None)

    def _write(self, moments: list[dict[str, Any]]) -> None:
        about = {"text": self.config.record, "tokens": self.tokens, "heads": [f"{layer}.{head}" for layer, head in self.heads]}
        with atomic_write(self.path) as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in (about, *moments)).encode())

    def take(self, step: int, loss: float | None) -> None:
        """Add a moment. Raises LamaError if it cannot be written."""
        patterns = self._look(Tensor(np.array([self.tokens], np.int32)).realize()).numpy()  # (heads, T, T)
        numbers = np.rint(patterns[:, _seen(len(self.tokens))] * ONE).astype("<u2")
        moment = {"step": step, "loss": loss, "weights": base64.b64encode(zlib.compress(numbers.tobytes())).decode()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(moment) + "\n")
        except OSError as error:
            raise LamaError(f"{self.path} must be writable; got {error.strerror or error}") from error

    def cut(self, step: int) -> None:
        """Forget what came after `step`: a resumed run does it again. Raises LamaError for a damaged recording."""
        moments = []
        if os.path.lexists(self.path):
            about, *later = _lines(self.path)
            moments = [line for line in later if field(line, "step", int, quoted_path(self.path)) <= step]
            _recorded([about, *moments], self.path)
        self._write(moments)


def read_recording(path: Path) -> Recorded:
    """Raises LamaError where there is none, and for one that is not as lama train wrote it."""
    if not os.path.lexists(path):
        raise LamaError(f"a recording must be in the folder of a lama train --record; got no {quoted_path(path)}")
    return _recorded(_lines(path), path)


def _recorded(lines: list[dict[str, Any]], path: Path) -> Recorded:
    source, (about, *moments) = quoted_path(path), lines
    text, tokens, heads = (field(about, name, kind, source) for name, kind in (("text", str), ("tokens", list), ("heads", list)))
    for kind, items in ((int, tokens), (str, heads)):
        for item in items:
            checked(item, kind, f"a token or head in {source}")
    n = len(tokens)
    size = len(heads) * n * (n + 1)  # bytes of a moment's weights
    if not moments or 2 * size * len(moments) > LARGEST:
        raise LamaError(f"{source} must hold from 1 moment to {LARGEST:,} bytes of weights; got {len(moments)} moments of {n} tokens")
    patterns = np.zeros((len(moments), len(heads), n, n), np.float32)
    steps, losses = [], []
    for pattern, moment in zip(patterns, moments, strict=True):
        steps.append(field(moment, "step", int, source))
        losses.append(field(moment, "loss", float, source, None))
        numbers = np.frombuffer(_unpacked(field(moment, "weights", str, source), size, source), "<u2")
        pattern[:, _seen(n)] = numbers.reshape(len(heads), -1) / ONE
    return Recorded(text, tokens, heads, steps, losses, patterns)


def _unpacked(text: str, size: int, source: str) -> bytes:
    """A moment's weights, `size` bytes. Raises LamaError."""
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise LamaError(f"weights in {source} must be as lama train --record writes them; got {quoted(error, plain=True)}") from None
    if len(content) != size:
        raise LamaError(f"weights in {source} must have {size:,} bytes for its tokens and heads; got others")
    return content


def _seen(n: int) -> Any:
    """(n, n) bool: what is not ahead."""
    return np.tri(n) > 0


def _lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines, at least one: the last one may have been cut short by the end of the process. Raises LamaError."""
    *lines, _ = read_file(path, LARGEST).split(b"\n")
    if not lines:
        raise LamaError(f"{quoted_path(path)} must hold the moments of a recording; got nothing")
    return parse_json_lines(lines, quoted_path(path))
