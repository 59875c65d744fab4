"""What is seen of a training while it runs, and how it is stopped: for every command that trains."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lama.training.loop import Step

SECONDS_BETWEEN_LINES = 10  # where standard error is a file or a pipe


class Stoppable(Protocol):
    def stop(self) -> None: ...


def heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def tokenizing(pieces: Any) -> Any:
    """A progress bar over the bytes of the corpus."""
    from tqdm import tqdm

    return tqdm(pieces, unit="piece", desc="tokenizing", file=sys.stderr, dynamic_ncols=True, leave=False, delay=1)


def state(step: "Step", mfu: float | None, compiled: bool) -> str:
    """Of the live line: what one looks for while it runs. The first step compiles, so its speed says nothing."""
    from tqdm import tqdm

    parts = [
        f"loss {step.loss:.4g}",
        f"rate {step.learning_rate:.1e}",
        f"gradient {step.gradient_norm:.2f}",
    ]
    if compiled:
        parts.append(f"{step.tokens_per_second:,.0f} tokens/s")
        parts += [] if mfu is None else [f"MFU {mfu:.0%}"]
        parts.append(f"{tqdm.format_interval(step.seconds_left)} left")
    return ", ".join(parts)


class LiveLine:
    """Where the training stands, on standard error: in a terminal a line that is rewritten, elsewhere a new one now and then."""

    def __init__(self, steps: int, done: int, label: str = ""):
        from tqdm import tqdm

        # The time left is the loop's own: tqdm's would count the compilation into every step.
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.steps, self.next, self.label = steps, 0.0, label
        self.bar = (
            tqdm(desc=label or None, total=steps, initial=done, file=sys.stderr, dynamic_ncols=True, bar_format=layout, mininterval=0.2)
            if sys.stderr.isatty()
            else None
        )

    def step(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif (now := time.monotonic()) >= self.next or step == self.steps:
            self.next = now + SECONDS_BETWEEN_LINES
            print(f"{self.label and f'{self.label}, '}step {step} of {self.steps}: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line on standard output."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def stopping(session: Any) -> Iterator[list[int]]:
    """SIGINT and SIGTERM call `session.stop()`: the step under way ends; a second one ends the program. Yields the signals that came."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        session.stop()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(received: list[int], what: str) -> int:
    """Say which signal ended a training, and `what` comes of it; the exit code."""
    print(f"lama: stopped by {signal.Signals(received[0]).name}{what}", file=sys.stderr)
    return 128 + received[0]
