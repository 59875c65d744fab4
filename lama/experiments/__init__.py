"""Small experiments on common questions about transformers: modules with `run(options) -> Report`."""

import importlib
from collections.abc import Callable

from lama.experiments.report import Options, Report, Stopped

__all__ = ["ABOUT", "RESUMABLE", "TWO_SIZES", "Options", "Report", "Stopped", "find"]

ABOUT = {
    "arithmetic": "parameters, operations and memory of GPT-2's four sizes, from the models themselves",
    "order": "do positions or the mask tell the order of tokens? one pass against token by token",
    "scaling": "the effect of the division by √d on scores, softmax and gradient, for d from 4 to 1024",
    "similarities": "four ways to score a query and a key: finding a flagged token, modelling text",
    "layers": "separate weights for every layer, or shared weights",
    "skips": "depths 1 to 8 with and without residual stream and norms: gradients, rank, loss",
    "norms": "norms before or after each sub-layer, with and without warm-up",
    "positions": "position encodings, at the trained length and at twice that",
    "tying": "one vocabulary matrix or two",
    "recipe": "the choices of the modern presets, each replaced alone: optimizer, model, schedule",
    "words": "Shakespeare's complete works in whole words, compared with counts of words and pairs",
    "grokking": "addition modulo a prime: memorised first, generalised much later; the learned weights",
    "induction": "two attention-only layers learn to repeat their input, one cannot: the heads that do it",
}
"""The experiments by name, with their questions."""

TWO_SIZES = ("grokking",)
"""Experiments that `Options.full` changes."""

RESUMABLE = ("grokking", "induction")
"""Experiments that resume in the same `Options.folder`."""


def find(name: str) -> Callable[[Options], Report]:
    """The `run` of an experiment in ABOUT."""
    run: Callable[[Options], Report] = importlib.import_module(f"lama.experiments.{name}").run
    return run
