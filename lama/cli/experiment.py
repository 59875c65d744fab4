"""Ask a question about transformers and compute the answer.

Run an experiment, print its tables and whether its claims hold, and write report.json, report.html and,
where matplotlib is installed, its pictures. Exits with 1 if a claim does not hold.
"""

import argparse
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine
from lama.cli.live import LiveLine, state, stopped_by, stopping
from lama.cli.out import check_folder, own_folder
from lama.errors import LamaError, UsageError, check_least
from lama.figures import is_installed
from lama.files import field, quoted_path, read_object

if TYPE_CHECKING:
    from lama.experiments import Report
    from lama.training.loop import Step

UNFINISHED = "unfinished"  # subfolder with the state of an unfinished experiment
SETTINGS = {"experiment": str, "seed": int, "steps": int, "full": bool}


def add_parser(add_verb: AddVerb) -> None:
    from lama.experiments import ABOUT, RESUMABLE, TWO_SIZES

    listed = "\n".join(f"  {name:<14}{about}" for name, about in ABOUT.items())
    about = f"{__doc__}\nNAME is one of\n{listed}"
    parser = add_verb("experiment", run, about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add
    add("name NAME", "the experiment", choices=ABOUT)
    folder = "the report's folder (default out/experiments/NAME, or NAME-2 beside another report)"
    add("--out DIR", folder, type=Path)
    add("--steps N", "steps of each training in it (default: the experiment's own)", type=int)
    add("--seed SEED", "the same seed gives the same numbers", 0)
    add("--full", f"use the size of the paper, which takes hours ({', '.join(TWO_SIZES)})")
    earlier = "delete the earlier report or unfinished experiment in --out, which would otherwise be resumed"
    add("--restart", f"{earlier} ({', '.join(RESUMABLE)})")
    machine.add_options(parser)


def run(args: argparse.Namespace) -> int:
    from lama.experiments import TWO_SIZES

    for name, least in (("steps", 10), ("seed", 0)):
        check_least(name, getattr(args, name), least)
    if args.full and args.name not in TWO_SIZES:
        raise UsageError(f"--full must go with {' or '.join(TWO_SIZES)}; got {args.name}, which has one size")
    machine.use(args)
    default = Path("out") / "experiments" / args.name
    with own_folder(args.out, default, f"experiment {args.name}", partial(check_report, args)) as out:
        return answer(args, out)


def check_report(args: argparse.Namespace, out: Path) -> None:
    """Raises LamaError, before the work, unless the folder is free or has this experiment's output."""
    same = (None, settings_of(args))
    unfinished, report = (settings_in(out / file) for file in (f"{UNFINISHED}/settings.json", "report.json"))
    if not args.restart and unfinished not in same:
        resume = "its settings.json is damaged. Delete it"
        if unfinished:
            resume = f"resume it, {command_line(unfinished, out)}, delete it"
        found = f"--out has an unfinished experiment, {quoted_path(out)}"
        raise UsageError(f"{found}: {resume} with --restart, or choose another --out")
    # The same settings give the same report.
    replace = args.restart or report in same
    older = args.name in [found.get("experiment") for found in (unfinished, report) if found]
    check_folder(out, f"experiment {args.name}", replace, older=older)


def settings_in(file: Path) -> dict[str, object] | None:
    """The settings in an experiment's file; None without a file, {} if it is damaged."""
    if not os.path.lexists(file):
        return None
    try:
        found, source = read_object(file), quoted_path(file)
        return {name: field(found, name, kind, source, None) for name, kind in SETTINGS.items()}
    except LamaError:
        return {}


def answer(args: argparse.Namespace, out: Path) -> int:
    """Run the experiment, print and save its report. Returns the exit code."""
    from lama.atomic import remove
    from lama.experiments import RESUMABLE, Options, Stopped, find

    began, watch, folder, received = time.perf_counter(), Watch(), None, []
    with ExitStack() as stack:
        if args.name in RESUMABLE:
            folder = unfinished(out, args)
            received = stack.enter_context(stopping(watch.stop))
        try:
            report = find(args.name)(Options(args.seed, args.steps, args.full, folder, watch, watch.say))
        except Stopped as stopped:
            return stopped_by(received, f" in {stopped}; resume with: {command_line(settings_of(args), out)}")
    print(report)
    names = write(out, report, args)
    if folder is not None:
        remove(folder)
    print(f"\n{time.perf_counter() - began:.0f} s; saved in {out}: {', '.join(names)}")
    if failed := [claim for claim, holds in report.claims.items() if not holds]:
        count = f"{len(failed)} of {len(report.claims)}"
        raise LamaError(f"{count} claims do not hold. Try more --steps or another --seed")
    return 0


def unfinished(out: Path, args: argparse.Namespace) -> Path:
    from lama.atomic import remove, unwritable, write_atomically

    folder = out / UNFINISHED
    try:
        if args.restart:
            remove(folder)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    write_atomically(folder / "settings.json", json.dumps(settings_of(args)).encode())
    return folder


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    return {"experiment": args.name, "seed": args.seed, "steps": args.steps, "full": args.full}


def command_line(settings: Mapping[str, object], out: Path) -> str:
    """The command for the same experiment in the same folder."""
    flags = [f"--{name}={settings[name]}" for name in ("seed", "steps") if settings.get(name)]
    if settings.get("full"):
        flags.append("--full")
    return shlex.join(["lama", "experiment", str(settings.get("experiment")), *flags, "--out", str(out)])


def write(out: Path, report: "Report", args: argparse.Namespace) -> list[str]:
    from lama.atomic import write_files
    from lama.experiments import ABOUT

    drawn = is_installed()
    files = {
        "report.json": report.to_json(settings_of(args)).encode(),
        "report.html": report.to_html(f"lama experiment {args.name}", ABOUT[args.name], drawn).encode(),
    }
    if report.panels and drawn:
        files["curves.png"] = report.picture()
    if report.maps and drawn:
        files["maps.png"] = report.maps_picture
    write_files(out, files)
    return list(files)


class Watch:
    """The progress of an experiment's trainings, and the means to stop them."""

    def __init__(self) -> None:
        self.said, self.stopped = "", False

    def __call__(self, steps: "Iterable[Step]", total: int, label: str) -> "Iterator[Step]":
        """The steps with a live line. Raises Stopped after a step in which `stop` was called."""
        from lama.experiments import Stopped

        self.said, first = "", 0
        with closing(LiveLine(total, 0, label)) as line:
            for step in steps:
                first = first or step.step
                parts = [state(step, None, compiled=step.step > first), self.said]
                line.step(step.step, ", ".join(filter(None, parts)))
                yield step
                if self.stopped and step.step < total:
                    raise Stopped(f"{label}, step {step.step} of {total}")

    def say(self, text: str) -> None:
        self.said = text

    def stop(self) -> None:
        self.stopped = True
