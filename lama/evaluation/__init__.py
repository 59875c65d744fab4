"""How good a model is: perplexity of a text, and the benchmarks HellaSwag and LAMBADA."""

from lama.evaluation.perplexity import TextScore, perplexity
from lama.evaluation.tasks import TASKS, Example, Task, TaskScore, evaluate, read_examples

__all__ = ["TASKS", "Example", "Task", "TaskScore", "TextScore", "evaluate", "perplexity", "read_examples"]
