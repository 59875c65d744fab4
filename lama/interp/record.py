"""Run a model and keep its activations as arrays, under TransformerLens's names or lama's shorter ones."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from tinygrad import Tensor

from lama.errors import did_you_mean
from lama.taps import Recorder

RENAMED = {"attn_scores": "scores"}
"""The last part of TransformerLens's name, without `hook_`, where lama's is another."""

Tokens = Any  # an array, a tensor or lists of token ids (B, T); of an encoder-decoder, a tuple of two such, source and target


def short_name(name: str) -> str:
    """lama's name of an activation, or a pattern of names, that is given in TransformerLens's way; lama's own stay what they are.

    `hook_` is left out, and hook_attn_scores is scores: blocks.0.attn.hook_attn_scores -> blocks.0.attn.scores,
    blocks.*.hook_resid_pre -> blocks.*.resid_pre. Arrays have lama's axes: q, k, v and z are (B, H, T, d_head) where TransformerLens has
    (B, T, H, d_head), and pos_embed is (T, d_model) without a batch. `normalized` is what a norm gives, with its gain and bias; from
    TransformerLens 4 on that is its ln1.hook_out.
    """
    scope, dot, last = name.rpartition(".")
    last = last.removeprefix("hook_")
    return f"{scope}{dot}{RENAMED.get(last, last)}"


class Cache(dict[str, np.ndarray]):
    """Activations by name; `cache["blocks.0.attn.hook_pattern"]` finds what is kept as `blocks.0.attn.pattern`."""

    def __missing__(self, name: str) -> np.ndarray:
        short = short_name(name)
        if short == name or short not in self:
            raise KeyError(f"{name} was not recorded; there are {len(self)} activations{did_you_mean(short, self)}")
        return self[short]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(short_name(name) if isinstance(name, str) else name)

    def layers(self, name: str) -> np.ndarray:
        """An activation of every layer in one array (n_layers, ...): `cache.layers("attn.pattern")`. Raises KeyError."""
        found: list[np.ndarray] = []
        while f"blocks.{len(found)}.{name}" in self:
            found.append(self[f"blocks.{len(found)}.{name}"])
        return np.stack(found or [self[f"blocks.0.{name}"]])


def run_with_cache(model: Any, tokens: Tokens, *patterns: str) -> tuple[np.ndarray, Cache]:
    """The model's output for these tokens, and the activations whose names match one of `patterns` (shell wildcards; without any, all),
    in float32.

    Works with every model that takes a tap; of an encoder-decoder, `tokens` is (source, target) and names begin with encoder. or decoder.
    What the model computes is what it computes without. Raises ValueError where a pattern matches nothing.
    """
    record = Recorder(*map(short_name, patterns))
    inputs = [as_tokens(part) for part in (tokens if isinstance(tokens, tuple) else (tokens,))]
    names: list[str] = []

    def tap(name: str, value: Tensor) -> Tensor:
        names.append(name)
        return record(name, value)

    output = model(*inputs, tap=tap)
    check_matches(patterns, names)
    Tensor.realize(output, *record.values())
    return output.float().numpy(), Cache({name: value.float().numpy() for name, value in record.items()})


def as_tokens(tokens: Any) -> Tensor:
    """Token ids (B, T), or one row (T,), as a tensor (B, T)."""
    tensor = tokens if isinstance(tokens, Tensor) else Tensor(np.asarray(tokens, np.int32))
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor


def check_matches(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ValueError for the first pattern that matches nothing."""
    for pattern in patterns:
        if not any(fnmatchcase(name, short_name(pattern)) for name in names):
            raise ValueError(f"a pattern must match the name of an activation; got {pattern!r}{did_you_mean(short_name(pattern), names)}")
