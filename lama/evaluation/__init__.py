"""Evaluate models: perplexity of a text, and the benchmarks HellaSwag and LAMBADA."""

BENCHMARKS = ("hellaswag", "lambada")
"""Keys of `tasks.TASKS`, here for the command line, which must not import tinygrad for its help."""
