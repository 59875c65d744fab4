"""What some heads look at in one sentence, kept at intervals while a model learns: recording.jsonl in the run's folder.

Its first line says of what: {"text", "tokens", "heads"}; each line after it is a moment: {"step", "loss", "weights"}, the weights as whole
numbers of 1/65535, head by head and row by row without what is ahead, little-endian, deflated and in base64.
"""

import base64
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.checkpoints.atomic import atomic_write
from lama.data.inputs import check_length
from lama.errors import LamaError, UsageError
from lama.jit import capture_at_once
from lama.models.gpt import GPT, GPTConfig
from lama.taps import Recorder
from lama.tokenizers import Tokenizer
from lama.training.config import RunConfig

ONE = 65535  # a weight of 1, as it is stored
MOMENTS = 60  # of a run, where record_every is not given
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
    if not (dot and layer.isdecimal() and head.isdecimal() and int(layer) < shape.n_layers and int(head) < shape.n_heads):
        raise UsageError(
            f"record_heads must be LAYER.HEAD of the model's {shape.n_layers} x {shape.n_heads}, counted from 0; got {name!r}. "
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
    """Of the batch of each step, nats per token; None before the first."""
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
        """Forget what came after `step`: a resumed run does it again."""
        self._write([line for line in _lines(self.path) if line.get("step", math.inf) <= step] if self.path.exists() else [])


def read_recording(path: Path) -> Recorded:
    """Raises LamaError where there is none, or it has no moments."""
    try:
        about, *moments = _lines(path)
        tokens, heads = about["tokens"], about["heads"]
        patterns = np.zeros((len(moments), len(heads), len(tokens), len(tokens)), np.float32)
        for pattern, moment in zip(patterns, moments, strict=True):
            numbers = np.frombuffer(zlib.decompress(base64.b64decode(moment["weights"])), "<u2")
            pattern[:, _seen(len(tokens))] = numbers.reshape(len(heads), -1) / ONE
        steps, losses = ([moment[name] for moment in moments] for name in ("step", "loss"))
        return Recorded(about["text"], tokens, heads, steps, losses, patterns)
    except OSError as error:
        raise LamaError(f"a recording must be in the folder of a lama train --record; got no {path} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise LamaError(f"a recording must be what lama train --record wrote; got {error!r} in {path}") from None


def _seen(n: int) -> Any:
    """(n, n) bool: what is not ahead."""
    return np.tri(n) > 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines: the last one may have been cut short by the end of the process."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
