"""Trackers that log a run's numbers beside its log: TensorBoard's files, Weights & Biases, Trackio."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lama.errors import LamaError, UsageError, first_line

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}

Library = Any  # a module without types


class Tracker:
    """Logs numbers step by step; without `close`, the last numbers may be lost."""

    def __init__(self, write: Callable[[dict[str, float], int], object], close: Callable[[], None]):
        self._write, self.close = write, close

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Log numbers; other values are skipped. A step may be logged again with other metrics."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if numbers:
            self._write(numbers, step)


def open_tracker(kind: str, folder: Path, name: str, config: Mapping[str, object]) -> Tracker:
    """Begin to track a run called `name` with its settings.

    tensorboard writes event files in `folder/tensorboard`; wandb and trackio have the project `lama`, with
    files in `folder/wandb` and in Trackio's own folder. `WANDB_MODE=offline` sends nothing. Raises
    UsageError for another kind, LamaError if the library is not installed or does not start.
    """
    library = import_tracker(kind)
    try:
        if kind == "tensorboard":
            return _tensorboard(library, folder, config)
        options = {"project": "lama", "name": name, "config": dict(config)}
        if kind == "wandb":
            folder.mkdir(parents=True, exist_ok=True)  # otherwise it writes into a temporary folder
            options["dir"] = str(folder)
        run = library.init(**options)
        return Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)
    except Exception as error:  # each library has its own: no key, no network, no space
        reason = first_line(error).rstrip(".")
        raise LamaError(f"{kind} could not start: {reason}. Correct this, or leave --track out") from error


def import_tracker(kind: str) -> Library:
    """The library of a tracker. Raises UsageError for another kind, LamaError if it is not installed."""
    if kind not in PACKAGES:
        raise UsageError(f"a tracker must be one of {', '.join(PACKAGES)}; got {kind!r}")
    package = PACKAGES[kind]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise LamaError(
            f"tracking with {kind} needs the package {package} ({error}). Run: pip install {package}"
        ) from None


def _tensorboard(library: Library, folder: Path, config: Mapping[str, object]) -> Tracker:
    writer = library.SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
    lines = json.dumps(dict(config), ensure_ascii=False, indent=1).splitlines()
    # Indented lines are code in TensorBoard's Markdown.
    writer.add_text("config", "\n".join(f"    {line}" for line in lines), 0)

    def write(numbers: dict[str, float], step: int) -> None:
        for metric, value in numbers.items():
            writer.add_scalar(metric, value, step)

    return Tracker(write, writer.close)
