"""`lama experiment`: ask a question about transformers and compute the answer."""

import argparse
import importlib.util
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import Verbs, machine
from lama.cli.live import LiveLine, state, stopped_by, stopping
from lama.cli.out import check_folder, own_folder
from lama.errors import LamaError, UsageError
from lama.files import field, quoted_path, read_object

if TYPE_CHECKING:
    from lama.experiments import Report
    from lama.training.loop import Step

UNFINISHED = "unfinished"  # subfolder with the state of an unfinished experiment
SETTINGS = {"experiment": str, "seed": int, "steps": int, "full": bool}


def add_parser(verbs: Verbs) -> None:
    from lama.experiments import ABOUT, RESUMABLE, TWO_SIZES

    listed = "\n".join(f"  {name:<14}{about}" for name, about in ABOUT.items())
    parser = verbs.add_parser(
        "experiment",
        help="ask a question about transformers and compute the answer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run an experiment, print its tables and whether its claims hold, and write report.json, "
        "report.html and,\nwhere matplotlib is installed, its pictures. Exits with 1 if a claim does not "
        f"hold.\n\nNAME is one of\n{listed}",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("name", metavar="NAME", choices=ABOUT, help="the experiment")
    folder = "the report's folder (default out/experiments/NAME, or NAME-2 beside another report)"
    add("--out", type=Path, metavar="DIR", help=folder)
    add("--steps", type=int, metavar="N", help="steps of each training in it (default: the experiment's own)")
    add("--seed", type=int, default=0, help="the same seed gives the same numbers (default 0)")
    add(
        "--full",
        action="store_true",
        help=f"use the size of the paper, which takes hours ({', '.join(TWO_SIZES)})",
    )
    add(
        "--restart",
        action="store_true",
        help="delete the earlier report or unfinished experiment in --out, which would otherwise be resumed "
        f"({', '.join(RESUMABLE)})",
    )
    machine.add_options(parser)


def run(args: argparse.Namespace) -> int:
    from lama.experiments import TWO_SIZES

    for name, least in (("steps", 10), ("seed", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UsageError(f"{name} must be at least {least}; got {value}")
    if args.full and args.name not in TWO_SIZES:
        raise UsageError(f"--full must go with {' or '.join(TWO_SIZES)}; got {args.name}, which has one size")
    machine.use(args)
    default = Path("out") / "experiments" / args.name
    with own_folder(args.out, default, f"experiment {args.name}", partial(check_report, args)) as out:
        return answer(args, out)


def check_report(args: argparse.Namespace, out: Path) -> None:
    """Raises LamaError, before the work, unless the folder is free or has this experiment's output."""
    same = (None, settings_of(args))
    unfinished = settings_in(out / UNFINISHED / "settings.json")
    if not args.restart and unfinished not in same:
        resume = "its settings.json is damaged. Delete it"
        if unfinished:
            resume = f"resume it, {command_line(unfinished, out)}, delete it"
        found = f"--out has an unfinished experiment, {quoted_path(out)}"
        raise UsageError(f"{found}: {resume} with --restart, or choose another --out")
    # The same settings give the same report.
    replace = args.restart or settings_in(out / "report.json") in same
    check_folder(out, f"experiment {args.name}", replace, older=lambda folder: is_report(folder, args.name))


def is_report(folder: Path, name: str) -> bool:
    """Whether a folder without a marker has this experiment's output of an earlier version."""
    found = [settings_in(folder / file) for file in ("report.json", f"{UNFINISHED}/settings.json")]
    return any(settings is not None and settings.get("experiment") == name for settings in found)


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
    """Run the experiment, print and save its report; returns the exit code."""
    from lama.atomic import remove
    from lama.experiments import RESUMABLE, Options, Stopped, find

    began = time.perf_counter()
    resumable, watch = args.name in RESUMABLE, Watch()
    folder = unfinished(out, args) if resumable else None
    stops: AbstractContextManager[list[int]] = stopping(watch) if resumable else nullcontext([])
    with stops as received:
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
    """Create the folder for this experiment's state; an earlier state stays. Raises LamaError."""
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
    """The settings that determine a report."""
    return {"experiment": args.name, "seed": args.seed, "steps": args.steps, "full": args.full}


def command_line(settings: Mapping[str, object], out: Path) -> str:
    """The command for the same experiment in the same folder."""
    flags = [f"--{name}={settings[name]}" for name in ("seed", "steps") if settings.get(name)]
    if settings.get("full"):
        flags.append("--full")
    return shlex.join(["lama", "experiment", str(settings.get("experiment")), *flags, "--out", str(out)])


def write(out: Path, report: "Report", args: argparse.Namespace) -> list[str]:
    """Write the files of a report; returns their names."""
    from lama.atomic import write_files
    from lama.experiments import ABOUT

    drawn = importlib.util.find_spec("matplotlib") is not None
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
    """Show the progress of an experiment's trainings, and stop them."""

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
