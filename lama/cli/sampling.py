"""Options for sampling, and for the context."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lama.cli import Parser


def add_sampling(parser: Parser) -> None:
    add = parser.add
    own = "(default: the model's"
    add("--temperature T", f"0 is greedy {own}, else 0.8)", type=float)
    add("--top-k K", f"sample from the K likeliest tokens only {own}, else all)", type=int)
    add("--top-p P", f"sample from the fewest tokens that reach the probability P {own}, else 1)", type=float)
    add(
        "--min-p P",
        f"sample from tokens at least P times as likely as the most likely one {own}, else 0)",
        type=float,
    )
    add("--repetition-penalty R", f"above 1 makes tokens seen before less likely {own}, else 1)", type=float)
    for name in ("presence", "frequency"):
        times = "if it was" if name == "presence" else "for each time that it was"
        about = f"subtract P from a token's logit {times} already generated {own}, else 0)"
        add(f"--{name}-penalty P", about, type=float)
    add("--seed SEED", "the same seed gives the same text", 0)
    most = "the model's own, limited to a cache of 2^28 numbers"
    add("--context N", f"largest number of tokens that the model attends to (default: {most})", type=int)


def sampling(args: argparse.Namespace, recommended: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The fields of `Sampling`, and the seed: options, else what the model recommends, else defaults.

    Raises UsageError for a value out of its range.
    """
    from lama.generation import Sampling

    defaults = {each.name: each.default for each in fields(Sampling)} | {"temperature": 0.8}
    given = {name: value for name in defaults if (value := getattr(args, name)) is not None}
    options: dict[str, Any] = defaults | dict(recommended or {}) | given
    Sampling(**options)
    return {**options, "seed": args.seed}
