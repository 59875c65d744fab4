"""Taps: look at, record or replace an activation by name while a model runs.

A tap is any function `(name, value) -> value` that every layer calls on its activations. The default returns
the value untouched. Names are TransformerLens's without `hook_` (and `scores` for its `attn_scores`):
`embed`, `pos_embed`, `blocks.0.resid_pre`, `blocks.0.ln1.normalized`, `blocks.0.attn.q`, `.k`, `.v`,
`.scores`, `.pattern`, `.z`, `blocks.0.attn_out`, `blocks.0.resid_mid`, `blocks.0.mlp.pre`,
`blocks.0.mlp.post`, `blocks.0.mlp_out`, `blocks.0.resid_post`, `ln_final.normalized`, `logits`.

    record = Recorder()
    logits = model(tokens, tap=record)
    record["blocks.0.attn.pattern"]                       # (B, H, T, S)

    def without_head_3(z): return z * mask                # mask: (1, H, 1, 1), zero at head 3
    logits = model(tokens, tap=replace({"blocks.0.attn.z": without_head_3}))
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from tinygrad import Tensor

from lama.runtime.fusion import no_fusion

Tap = Callable[[str, Tensor], Tensor]


def no_tap(name: str, value: Tensor) -> Tensor:
    """The default tap: every activation passes untouched."""
    return value


def scoped(tap: Tap, scope: str = "") -> Tap:
    """The tap of a sub-layer: its `q` reaches `tap` as `scope.q`, or as `q` without a scope.

    Tapped activations are never fused with later operations, so each is realised and has its own gradient.
    """
    prefix = f"{scope}." if scope else ""
    return tap if tap is no_tap else lambda name, value: tap(f"{prefix}{name}", no_fusion(value))


def chain(*taps: Tap) -> Tap:
    """Apply taps one after the other, each to the result of the one before."""

    def run(name: str, value: Tensor) -> Tensor:
        for tap in taps:
            value = tap(name, value)
        return value

    return run


def replace(edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Tap:
    """Replace each named activation by `edits[name](activation)`, which must keep its shape.

    Raises ValueError if an edit returns another shape.
    """

    def run(name: str, value: Tensor) -> Tensor:
        if name not in edits:
            return value
        new = edits[name](value)
        if new.shape != value.shape:
            got = f"{new.shape} for {name} {value.shape}"
            raise ValueError(f"a replaced activation must keep its shape; got {got}")
        return new

    return run


class Recorder(dict[str, Tensor]):
    """A tap that records, by name, the activations that match one of `patterns` (shell wildcards)."""

    def __init__(self, *patterns: str):
        super().__init__()
        self.patterns = patterns or ("*",)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if any(fnmatchcase(name, pattern) for pattern in self.patterns):
            self[name] = value
        return value
