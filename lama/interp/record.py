"""Run a model and record its activations as arrays, under TransformerLens's names or lama's shorter ones."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import numpy as np
from tinygrad import Tensor

from lama.errors import did_you_mean
from lama.shapes import Array
from lama.taps import Recorder

TokenIds: TypeAlias = Array | Tensor | Sequence[object]
"""Token ids (B, T) or (T,): an array, a tensor or lists."""


def short_name(name: str) -> str:
    """Translate TransformerLens's name of an activation, or a pattern of names, to lama's.

    blocks.0.attn.hook_attn_scores -> blocks.0.attn.scores, blocks.*.hook_resid_pre -> blocks.*.resid_pre.
    Arrays have lama's axes: q, k, v and z are (B, H, T, d_head) where TransformerLens has (B, T, H, d_head),
    and pos_embed is (T, d_model). `normalized` is a norm's output with gain and bias, TransformerLens 4's
    ln1.hook_out.
    """
    scope, dot, last = name.rpartition(".")
    last = last.removeprefix("hook_")
    return f"{scope}{dot}{'scores' if last == 'attn_scores' else last}"


class Cache(dict[str, Array]):
    """Activations by name; `cache["blocks.0.attn.hook_pattern"]` finds `blocks.0.attn.pattern`."""

    def __missing__(self, name: str) -> Array:
        short = short_name(name)
        if short == name or short not in self:
            hint = did_you_mean(short, self)
            raise KeyError(f"{name} was not recorded; there are {len(self)} activations{hint}")
        return self[short]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(short_name(name) if isinstance(name, str) else name)

    def layers(self, name: str) -> Array:
        """An activation of all layers (n_layers, ...): `cache.layers("attn.pattern")`. Raises KeyError."""
        found: list[Array] = []
        while (key := f"blocks.{len(found)}.{name}") in self:
            found.append(self[key])
        return np.stack(found or [self[key]])


def run_with_cache(
    model: Callable[..., Tensor], tokens: TokenIds | tuple[TokenIds, TokenIds], *patterns: str
) -> tuple[Array, Cache]:
    """Run a model that accepts a tap. Returns its output and its activations, in float32.

    `patterns` (shell wildcards) choose activations by name; the default is all. For an encoder-decoder,
    `tokens` is (source, target) and names begin with encoder. or decoder. Raises ValueError if a pattern
    matches nothing.
    """
    record = Recorder(*map(short_name, patterns))
    inputs = [as_tokens(part) for part in (tokens if isinstance(tokens, tuple) else (tokens,))]
    names: list[str] = []

    def tap(name: str, value: Tensor) -> Tensor:
        names.append(name)
        return record(name, value)

    output = model(*inputs, tap=tap)
    for pattern, short in zip(patterns, record.patterns, strict=False):
        if not any(fnmatchcase(name, short) for name in names):
            hint = did_you_mean(short, names)
            raise ValueError(f"a pattern must match the name of an activation; got {pattern!r}{hint}")
    Tensor.realize(output, *record.values())
    return output.float().numpy(), Cache({name: value.float().numpy() for name, value in record.items()})


def as_tokens(tokens: TokenIds) -> Tensor:
    """Token ids (B, T), or one row (T,), as a tensor (B, T)."""
    tensor = tokens if isinstance(tokens, Tensor) else Tensor(np.asarray(tokens, np.int32))
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
