"""The parts of a process's time, by its clock; `lama doctor --start` shows them."""

import importlib.machinery
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType

IMPORTS = ("lama", "tinygrad", "numpy")  # packages whose imports are separate parts


class Clock:
    """Seconds of each part of a process's time. Parts follow one another, so that they sum to the whole."""

    def __init__(self, part: str, began: float):
        """`began`: the moment of `time.perf_counter` when `part` began, perhaps in another process."""
        self.seconds: dict[str, float] = {}
        self._part, self._since = part, began

    def switch(self, part: str) -> str:
        """End the current part and begin another; returns the one that ended."""
        now, before = time.perf_counter(), self._part
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._part, self._since = part, now
        return before


clock: Clock | None = None
"""The clock of this process; without one, nothing is measured."""


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Count the time of the block as this part's, except for parts inside it."""
    if clock is None:
        yield
        return
    before = clock.switch(name)
    try:
        yield
    finally:
        clock.switch(before)


class TimedFinder:
    """The import system's finder of files, which counts the time that modules take to execute."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = partial(self._execute, name.partition(".")[0], spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def _execute(self, root: str, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        with timed(f"import {root if root in IMPORTS else 'others'}"):
            execute(module)


def measure(began: float) -> Clock:
    """Count this process's time from now on, imports as parts; the process started at `began`."""
    global clock
    clock = Clock("Python itself", began)
    clock.switch("the command line")
    sys.meta_path.insert(0, TimedFinder())  # type: ignore[arg-type]
    return clock
