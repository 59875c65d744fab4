"""Attention patterns of some heads on one sentence during a training: recording.jsonl in the run's folder.

The first line describes the recording: {"text", "tokens", "heads"}. Each other line is a moment: {"step",
"loss", "weights"}. The weights are integers in units of 1/65535, for each head the rows up to the diagonal;
16-bit little-endian, compressed by zlib, in base64.
"""

import base64
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tinygrad import Tensor

from lama.data.inputs import check_length
from lama.errors import LamaError, UsageError, quoted
from lama.files import checked, field, quoted_path
from lama.models.gpt import GPT, GPTConfig
from lama.runtime.capture import CapturedStep
from lama.shapes import Array
from lama.taps import Recorder
from lama.tokenizers import Tokenizer
from lama.training.lines import Record, append_line, read_lines, write_lines
from lama.training.settings import RunConfig

ONE = 65535  # a weight of 1 in the file
MOMENTS = 60  # moments of a run, by default
LARGEST = 1 << 30  # the most bytes of a recording, and of the weights in it
HEADS = 12  # the most heads by default, from the first layers on

Head = tuple[int, int]


def what_to_record(config: RunConfig, tokenizer: Tokenizer, shape: GPTConfig) -> tuple[list[int], list[Head]]:
    """The sentence's tokens and the heads of the settings. Raises LamaError for a long sentence."""
    if not config.record:
        if config.record_heads or config.record_every:
            missing = "got no sentence. Add --record TEXT"
            raise UsageError(f"record_heads and record_every must be given with record; {missing}")
        return [], []
    layers, heads = range(shape.n_layers), range(shape.n_heads)
    known = {f"{layer}.{head}": (layer, head) for layer in layers for head in heads}
    for name in config.record_heads:
        if name not in known:
            raise UsageError(
                f"record_heads must be LAYER.HEAD of the model's {len(layers)} x {len(heads)}, counted "
                f"from 0; got {quoted(name)}. Choose 0.0 to {len(layers) - 1}.{len(heads) - 1}"
            )
    chosen = [known[name] for name in config.record_heads or list(known)[:HEADS]]
    return check_length(tokenizer.encode(config.record), config.context_length), chosen


@dataclass(frozen=True)
class Recorded:
    """A recording, read from its file."""

    text: str
    tokens: list[int]
    heads: list[str]
    """`0.1` for each: layer and head."""
    steps: list[int]
    losses: list[float | None]
    """The batch loss of each step, nats per token; None before the first."""
    patterns: Array
    """(steps, heads, T, T)."""


class Recording:
    """Records the attention patterns of a GPT during its training, by one captured step."""

    def __init__(self, path: Path, model: GPT, config: RunConfig, tokenizer: Tokenizer):
        self.path, self.config = path, config
        tokens, self.heads = what_to_record(config, tokenizer, model.config)
        self.tokens, self.every = tokens, config.record_every or max(1, config.steps // MOMENTS)
        names = {layer: f"blocks.{layer}.attn.pattern" for layer, _ in self.heads}

        def look(ids: Tensor) -> Tensor:
            record = Recorder(*names.values())
            model(ids, tap=record)
            patterns = [record[names[layer]][0, head] for layer, head in self.heads]
            return Tensor.stack(*patterns).float().realize()

        self._look = CapturedStep(look)

    def due(self, step: int) -> bool:
        """Whether a moment is due after this step."""
        return step % self.every == 0 or step == self.config.steps

    def begin(self) -> None:
        """Write the first line, and record the untrained model. Raises LamaError if it cannot be written."""
        self._write([])
        self.take(0, None)

    def _write(self, moments: list[Record]) -> None:
        heads = [f"{layer}.{head}" for layer, head in self.heads]
        about = {"text": self.config.record, "tokens": self.tokens, "heads": heads}
        write_lines(self.path, (about, *moments))

    def take(self, step: int, loss: float | None) -> None:
        """Add a moment. Raises LamaError if it cannot be written."""
        patterns = self._look(Tensor(np.array([self.tokens], np.int32)).realize()).numpy()  # (heads, T, T)
        numbers = np.rint(patterns[:, _seen(len(self.tokens))] * ONE).astype("<u2")
        weights = base64.b64encode(zlib.compress(numbers.tobytes())).decode()
        append_line(self.path, {"step": step, "loss": loss, "weights": weights})

    def cut(self, step: int) -> None:
        """Remove the moments after `step`, which a resumed run repeats. Raises LamaError."""
        moments = []
        if os.path.lexists(self.path):
            about, *later = _lines(self.path)
            moments = [line for line in later if field(line, "step", int, quoted_path(self.path)) <= step]
            _recorded([about, *moments], self.path)
        self._write(moments)


def read_recording(path: Path) -> Recorded:
    """Read a recording. Raises LamaError if there is none, or it is damaged."""
    if not os.path.lexists(path):
        where = quoted_path(path)
        raise LamaError(f"{where} does not exist. Give the folder of a lama train --record")
    return _recorded(_lines(path), path)


def _recorded(lines: list[Record], path: Path) -> Recorded:
    source, (about, *moments) = quoted_path(path), lines
    text, tokens = field(about, "text", str, source), field(about, "tokens", list, source)
    heads = field(about, "heads", list, source)
    for kind, items in ((int, tokens), (str, heads)):
        for item in items:
            checked(item, kind, f"a token or head in {source}")
    n = len(tokens)
    size = len(heads) * n * (n + 1)  # bytes of a moment's weights
    if not moments or 2 * size * len(moments) > LARGEST:
        found = f"{len(moments)} moments of {n} tokens"
        raise LamaError(f"{source} must hold from 1 moment to {LARGEST:,} bytes of weights; got {found}")
    patterns = np.zeros((len(moments), len(heads), n, n), np.float32)
    steps, losses = [], []
    for pattern, moment in zip(patterns, moments, strict=True):
        steps.append(field(moment, "step", int, source))
        losses.append(field(moment, "loss", float, source, None))
        numbers = np.frombuffer(_unpacked(field(moment, "weights", str, source), size, source), "<u2")
        pattern[:, _seen(n)] = numbers.reshape(len(heads), -1) / ONE
    return Recorded(text, tokens, heads, steps, losses, patterns)


def _unpacked(text: str, size: int, source: str) -> bytes:
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise LamaError(f"weights in {source} are damaged: {quoted(error, plain=True)}") from None
    if len(content) != size:
        raise LamaError(f"weights in {source} must have {size:,} bytes for its tokens and heads; got others")
    return content


def _seen(n: int) -> Array:
    """The positions that a row may attend to: (n, n) bool."""
    return np.tri(n) > 0


def _lines(path: Path) -> list[Record]:
    """All lines, at least one. Raises LamaError."""
    if not (lines := read_lines(path, LARGEST)):
        raise LamaError(f"{quoted_path(path)} must hold the moments of a recording; got nothing")
    return lines
