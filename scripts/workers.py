"""Processes that measure, for bench_cpu.py and bench_gpu.py, and the texts of their figures.

A worker reads requests from standard input, a JSON object a line, and answers each with another: its figures,
or {"error": reason}, which is its last.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median
from threading import Timer
from typing import Any

Answer = dict[str, Any]


class Worker:
    """A process that measures, stopped (SIGSTOP) between requests: spinning threads would disturb others."""

    def __init__(self, command: Sequence[object], seconds: float = 1e6):
        """Start `command`. An answer after more than `seconds` is an error."""
        self.seconds = seconds
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ready(self) -> str | None:
        """Wait until it can be asked; returns the reason if it never can."""
        reason = self._read().get("error")
        self._send("SIGSTOP")
        return reason

    def ask(self, **request: object) -> Answer:
        self._send("SIGCONT")
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self._send("SIGSTOP")
        return answer

    def _read(self) -> Answer:
        late: list[bool] = []
        timer = Timer(self.seconds, lambda: (late.append(True), self.process.kill()))
        timer.daemon = True
        timer.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        status = self.process.wait()
        return {"error": f"no answer in {self.seconds:.0f} s" if late else f"ended with status {status}"}

    def _send(self, name: str) -> None:
        if hasattr(signal, name) and self.process.poll() is None:
            self.process.send_signal(getattr(signal, name))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def answer_requests(load: Callable[[], Callable[..., Answer]]) -> None:
    """The main loop of a worker: load an engine, then answer requests until standard input ends.

    Output of libraries is sent to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        engine = load()
        answer(ready=True)
        for line in sys.stdin:
            answer(**engine(**json.loads(line)))
    except Exception as error:
        lines = str(error).splitlines() or [""]
        answer(error=f"{type(error).__name__}: {lines[0][:150]}")


def spread(values: Sequence[float]) -> str:
    """The median and the extremes."""

    def short(value: float) -> str:
        return f"{value:,.0f}" if value >= 200 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

    return f"{short(median(values))} ({short(min(values))}–{short(max(values))})"


def ratio(rounds: Sequence[float]) -> str:
    """The median of each round's ratio, and the extremes."""
    return f"**{median(rounds):.2f}** ({min(rounds):.2f}–{max(rounds):.2f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; short rows are filled with empty cells."""
    full = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (columns, *full)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
