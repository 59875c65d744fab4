"""Evaluate models: perplexity of a text, and the benchmarks HellaSwag and LAMBADA."""

from typing import TYPE_CHECKING

from lama.lazy import lazy_names

if TYPE_CHECKING:
    from lama.evaluation.likelihood import Progress
    from lama.evaluation.sliding import TextScore, perplexity
    from lama.evaluation.tasks import TASKS, BenchmarkItem, TaskScore, evaluate, read_examples

BENCHMARKS = ("hellaswag", "lambada")
"""Keys of TASKS, here for the command line, which must not import tinygrad for its help."""

__all__ = [
    "BENCHMARKS",
    "TASKS",
    "BenchmarkItem",
    "Progress",
    "TaskScore",
    "TextScore",
    "evaluate",
    "perplexity",
    "read_examples",
]

_homes = dict.fromkeys(__all__, "lama.evaluation.tasks") | {"Progress": "lama.evaluation.likelihood"}
_homes |= dict.fromkeys(("TextScore", "perplexity"), "lama.evaluation.sliding")
__getattr__ = lazy_names(__name__, _homes)
