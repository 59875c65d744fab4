"""Evaluate models: perplexity of a text, and the benchmarks HellaSwag and LAMBADA."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lama.evaluation.likelihood import Progress
    from lama.evaluation.sliding import TextScore, perplexity
    from lama.evaluation.tasks import TASKS, BenchmarkItem, Task, TaskScore, evaluate, read_examples

BENCHMARKS = ("hellaswag", "lambada")
"""Keys of TASKS, here for the command line, which must not import tinygrad for its help."""

__all__ = [
    "BENCHMARKS",
    "TASKS",
    "BenchmarkItem",
    "Progress",
    "Task",
    "TaskScore",
    "TextScore",
    "evaluate",
    "perplexity",
    "read_examples",
]


def __getattr__(name: str) -> object:
    from lama.lazy import lazy_names

    homes = dict.fromkeys(__all__, "lama.evaluation.tasks")
    homes["Progress"] = "lama.evaluation.likelihood"
    homes |= dict.fromkeys(("TextScore", "perplexity"), "lama.evaluation.sliding")
    return lazy_names(__name__, homes)(name)
