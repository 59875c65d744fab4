"""Captured runs of a model's blocks over one whole text, for activations and embeddings.

tinygrad takes 50 ms to schedule a block, longer than a short text takes to compute. All blocks have the same
kernels, with other weights. So the first block is captured and saved on disk, for a few widths to which texts
are padded.
"""

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.generation.decoder import bucket, buffers, rope_tables
from lama.interp.record import as_tokens
from lama.masks import Causal
from lama.models.adapters import changes_of, constants_of
from lama.models.gpt import GPT
from lama.runtime.buffers import write, zeros
from lama.runtime.replay import CachedStep
from lama.shapes import Array
from lama.taps import Recorder, no_tap, scoped

SMALLEST = 64  # tokens: shorter runs are hardly faster, and each width must be captured


class BlockSteps:
    """The captured blocks of one model, for texts of one width. Not thread-safe."""

    def __init__(self, model: GPT, width: int):
        self.model, self.weights, self.width = model, buffers(model), width
        c, self._device = model.config, str(model.embed.weight.device)
        self._dtype = model.embedded(Tensor.zeros(1, width, dtype=dtypes.int32)).dtype
        self._x = zeros(1, width, c.d_model, dtype=dtypes.float32, device=self._device)
        self._taps: dict[str, Tensor] = {}
        self._steps: dict[tuple[int, bool], CachedStep] = {}
        # Layers that differ in more than their weights, such as windows, repeat after this many.
        in_turn = math.lcm(len(c.windows) or 1, len(c.rope_layers) or 1)
        self._kinds = c.n_layers if c.scale_by_layer else in_turn

    def __call__(self, layer: int, x: Array, names: Collection[str]) -> tuple[Array, dict[str, Array]]:
        """A block's output for its input (T, d_model), and its activations of these names, in float32."""
        write(self._x, x)
        key = layer, bool(names)
        if key not in self._steps:
            self._steps[key] = self._step(*key)
        out = self._steps[key]()[0]
        return out, {name: self._taps[name].numpy()[0] for name in names}

    def _step(self, layer: int, tapped: bool) -> CachedStep:
        """The step of a block, which overwrites `_taps` if it is tapped."""
        block, kind = self.model.blocks[layer], layer % self._kinds
        state = get_state_dict(block) | rope_tables(self.model, self.width) | {"x": self._x}
        if tapped:
            self._taps = self._taps or self._tap_buffers()
            state |= self._taps

        def function() -> Tensor:
            record = Recorder()
            out = block(self._x.cast(self._dtype), Causal(), tap=scoped(record) if tapped else no_tap)
            kept = [self._taps[name].assign(value.cast(dtypes.float32)) for name, value in record.items()]
            out = out.cast(dtypes.float32).contiguous()
            Tensor.realize(out, *kept)
            return out

        scope = f"blocks.{layer}."
        changes = changes_of(self.model).items()
        scales = [(at.removeprefix(scope), each.scale) for at, each in changes if at.startswith(scope)]
        name = f"block {kind} tapped={tapped} {self.model.config} {constants_of(self.model)} {scales}"
        return CachedStep(function, {}, state, name, like=self._steps.get((kind, tapped)))

    def _tap_buffers(self) -> dict[str, Tensor]:
        record = Recorder()
        for block in self.model.blocks[: self._kinds]:
            block(self._x.cast(self._dtype), Causal(), tap=scoped(record))  # never computed: gives the shapes
        return {
            name: zeros(*map(int, value.shape), dtype=dtypes.float32, device=self._device)
            for name, value in record.items()
        }


_steps: dict[int, BlockSteps] = {}  # by width, for one model at a time


def padded_to_width(tokens: Sequence[int], most: int) -> Array:
    """Tokens as (1, T) int32, padded at the end to one of a few widths; no token attends to the padding."""
    padded = np.zeros((1, bucket(max(len(tokens), SMALLEST), most)), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded


def text_stream(
    model: GPT, tokens: Sequence[int], names: Collection[str] = ()
) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield the residual stream (T, d_model) after the embedding and after each block, in float32.

    It comes with the activations of these `names` that were computed since. T is the padded length.
    """
    padded = padded_to_width(tokens, model.config.context_length)
    width = int(padded.shape[1])
    if any(each.model is not model or each.weights != buffers(model) for each in _steps.values()):
        _steps.clear()
    if width not in _steps:
        _steps[width] = BlockSteps(model, width)
    record = Recorder("embed", "pos_embed")
    embedded = model.embedded(as_tokens(padded), tap=record).float().realize(*record.values())
    x = embedded.numpy()[0]
    found = {name: value.float().numpy() for name, value in record.items() if name in names}
    yield x, {name: value if name == "pos_embed" else value[0] for name, value in found.items()}
    for layer in range(model.config.n_layers):
        scope = f"blocks.{layer}."
        inner = [name.removeprefix(scope) for name in names if name.startswith(scope)]
        x, found = _steps[width](layer, x, inner)
        yield x, {f"{scope}{name}": value for name, value in found.items()}
