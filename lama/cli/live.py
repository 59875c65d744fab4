"""Progress of a training on the screen, and the signals that stop it."""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from lama.errors import note

if TYPE_CHECKING:
    from lama.training.loop import Step

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10  # where standard error is a file or a pipe
HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # the terminal was closed


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def progress(
    items: Iterable[T], total: int | None = None, unit: str = "batch", label: str = ""
) -> Iterator[T]:
    """Show on standard error how many items are done: a bar in a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        options = {"total": total, "unit": unit, "desc": label or None, "leave": False, "delay": 1}
        yield from tqdm(items, file=sys.stderr, dynamic_ncols=True, **options)
        return
    began = following = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= following + SECONDS_BETWEEN_LINES or n == total:
            following = now
            of = "" if total is None else f"/{total:,}, {n / total:.0%}"
            say(f"{label or unit}: {n:,}{of}, {n / max(now - began, 1e-3):,.1f} {unit}/s")


def state(step: "Step", mfu: float | None, compiled: bool) -> str:
    """Text of the live line. The first step compiles, so its speed is left out."""
    from tqdm import tqdm

    text = f"loss {step.loss:.4g}, rate {step.learning_rate:.1e}, gradient {step.gradient_norm:.2f}"
    if not compiled:
        return text
    use = "" if mfu is None else f"MFU {mfu:.0%}, "
    left = tqdm.format_interval(step.seconds_left)
    return f"{text}, {step.tokens_per_second:,.0f} tokens/s, {use}{left} left"


class LiveLine:
    """Progress of the training on standard error: a line that is rewritten in a terminal, else new lines."""

    def __init__(self, steps: int, done: int, label: str = ""):
        from tqdm import tqdm

        self.steps, self.next, self.label, self.bar = steps, 0.0, label, None
        if sys.stderr.isatty():
            # The time left comes from the loop: tqdm's own would count the compilation.
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            options = {"total": steps, "initial": done, "bar_format": layout, "mininterval": 0.2}
            self.bar = tqdm(desc=label or None, file=sys.stderr, dynamic_ncols=True, **options)

    def step(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif (now := time.monotonic()) >= self.next or step == self.steps:
            self.next = now + SECONDS_BETWEEN_LINES
            say(f"{self.label and f'{self.label}, '}step {step} of {self.steps}: {text}")

    def say(self, text: str) -> None:
        """Print a line on standard output."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def stopping(stop: Callable[[], None], quiet: bool = False) -> Iterator[list[int]]:
    """Within it, SIGINT, SIGTERM and SIGHUP call `stop`, which finishes the current step.

    A second signal ends the program. After `nohup`, SIGHUP stays ignored. Yields the signals received.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            if callable(handler := before[signal.Signals(number)]):
                handler(number, frame)  # as outside: SIGTERM has an exit code of its own
            raise KeyboardInterrupt
        received.append(number)
        stop()
        if number == HANGUP:
            _forget_terminal()
        with suppress(OSError):  # not print, which the signal may have interrupted
            os.write(2, b"" if quiet else b"\nstopping after this step; once more to stop at once\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_terminal() -> None:
    """Discard standard output and error, unless they go to a file: the terminal is closed."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        with suppress(OSError):
            if not stat.S_ISREG(os.fstat(number).st_mode):
                os.dup2(null, number)
    os.close(null)


def stopped_by(received: list[int], what: str) -> int:
    """Print the signal that ended a training, followed by `what`. Returns the exit code."""
    note(f"stopped by {signal.Signals(received[0]).name}{what}")
    return 128 + received[0]
