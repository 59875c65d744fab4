"""Questions about transformers that a few minutes of computing answer, each a module with `run(options) -> Report`."""

import importlib
from collections.abc import Callable

from lama.experiments.report import Curve, Options, Panel, Report, Stopped, Table

__all__ = ["ABOUT", "RESUMABLE", "TWO_SIZES", "Curve", "Options", "Panel", "Report", "Stopped", "Table", "find"]

ABOUT = {
    "arithmetic": "parameters, operations and memory of GPT-2's four sizes, from the models themselves",
    "order": "what knows the order of the tokens: positions, the mask, or neither; all at once against one by one",
    "scaling": "what the division by √d does to scores, softmax and gradient, for d from 4 to 1024",
    "similarities": "four ways to score a query and a key: finding a flagged token, modelling text",
    "layers": "own weights for every layer, or one layer's used by all",
    "skips": "depths 1 to 8 with and without residual stream and norms: gradients, rank, loss",
    "norms": "norms before or after each sub-layer, with and without warm-up",
    "positions": "position encodings, at the trained length and at twice that",
    "tying": "one vocabulary matrix or two",
    "words": "Shakespeare's complete works in whole words, beside counting words and pairs",
    "grokking": "adding modulo a prime: by heart first, understood long after; what the weights then hold",
    "induction": "two layers of attention alone learn to repeat what they read, one cannot: which heads do it",
}
"""The experiments by name, and what each of them asks."""

TWO_SIZES = ("grokking",)
"""Those that `Options.full` changes."""

RESUMABLE = ("grokking", "induction")
"""Those that go on where they stopped, with the same `Options.folder`."""


def find(name: str) -> Callable[[Options], Report]:
    """An experiment of ABOUT."""
    run: Callable[[Options], Report] = importlib.import_module(f"lama.experiments.{name}").run
    return run
