"""The time from a process's start to its first token, in parts: `lama doctor --start`."""

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence

from lama import cli, timing
from lama.errors import LamaError
from lama.tables import Table

RUNS = 3  # the fastest is shown
PROMPT = "How can entropy be reversed?"
# The clock starts before anything else is imported.
CHILD = """import sys, lama.timing
lama.timing.measure(float(sys.argv[1]))
from lama.cli.start import run_measured
sys.exit(run_measured(sys.argv[2:]))"""


def start_table(model: str | None) -> str:
    """A table of the seconds that each part of `lama generate` takes until its first token.

    The command runs once to fill the caches, then RUNS times. Raises LamaError if it fails.
    """
    runs = [measured(model) for _ in range(1 + RUNS)][1:]
    parts, leaving = min(runs, key=lambda run: sum(run[0].values()))
    whole = sum(parts.values())
    rows = [*sorted(parts.items(), key=lambda part: -part[1]), ("start to first token", whole)]
    table = Table(["part", "seconds", "share"], [[n, f"{s:.3f}", f"{s / whole:.1%}"] for n, s in rows])
    lines = [str(table), f"The process then took {leaving:.3f} s to end."]
    if sys.dont_write_bytecode:
        lines.append("PYTHONDONTWRITEBYTECODE is set: Python may compile lama's modules at each start.")
    return "\n".join(lines)


def measured(model: str | None) -> tuple[dict[str, float], float]:
    """The seconds of each part of a new process, and those from the first token to its end."""
    words = ["generate", "-p", PROMPT, "-n", "1", "--temperature", "0", *(["-m", model] if model else [])]
    began = time.perf_counter()
    command = [sys.executable, "-c", CHILD, repr(began), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        raise LamaError("lama generate failed, so its start cannot be measured; its error is above")
    parts: dict[str, float] = json.loads(done.stdout)
    return parts, took - sum(parts.values())


def run_measured(words: Sequence[str]) -> int:
    """Run a lama command in this process, and print the seconds of its parts as JSON."""
    assert timing.clock is not None
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    timing.clock.switch("")
    print(json.dumps(timing.clock.seconds))
    return code
