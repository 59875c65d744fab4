"""`lama experiment`: ask a question about transformers and compute the answer."""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.out import check_folder
from lama.errors import LamaError, UsageError

if TYPE_CHECKING:
    from lama.experiments import Report


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    from lama.experiments import ABOUT

    listed = "\n".join(f"  {name:<14}{about}" for name, about in ABOUT.items())
    parser = verbs.add_parser(
        "experiment",
        help="ask a question about transformers and compute the answer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run an experiment, print its tables and whether its claims hold, and write report.json and, where matplotlib is "
        f"installed, curves.png.\nExits with 1 if a claim does not hold.\n\nNAME is one of\n{listed}",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("name", metavar="NAME", choices=ABOUT, help="which one")
    add("--out", type=Path, metavar="DIR", help="where the report goes (default out/experiments/NAME)")
    add("--steps", type=int, metavar="N", help="steps of each training in it (default: the experiment's own)")
    add("--seed", type=int, default=0, help="the same seed gives the same numbers (default 0)")
    machine.add_options(parser)
    add("-v", "--verbose", action="store_true", help="show tracebacks")


def run(args: argparse.Namespace) -> int:
    from lama.experiments import Options, find

    for name, least in (("steps", 10), ("seed", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UsageError(f"{name} must be at least {least}; got {value}")
    machine.use(args)
    out = args.out or Path("out") / "experiments" / args.name
    check_folder(out, ("report.json",), "a report of lama experiment")
    began = time.perf_counter()
    report = find(args.name)(Options(args.seed, args.steps, watch))
    print(report)
    names = write(out, report, args)
    print(f"\n{time.perf_counter() - began:.0f} s; saved in {out}: {', '.join(names)}")
    if failed := [claim for claim, holds in report.claims.items() if not holds]:
        raise LamaError(f"the numbers must bear the claims out; got {len(failed)} that do not hold. Try more --steps or another --seed")
    return 0


def write(out: Path, report: "Report", args: argparse.Namespace) -> list[str]:
    """The files of a report; returns their names."""
    from lama.checkpoints.atomic import atomic_write

    settings = {"experiment": args.name, "seed": args.seed, "steps": args.steps}
    files = {"report.json": json.dumps({**settings, **report.to_json()}, indent=1, ensure_ascii=False, default=list).encode()}
    if report.panels and importlib.util.find_spec("matplotlib") is not None:
        files["curves.png"] = report.picture()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LamaError(f"--out must be a folder that can be written; got {out} ({error.strerror})") from error
    for name, content in files.items():
        with atomic_write(out / name) as file:
            file.write(content)
    return list(files)


def watch(steps: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    """A progress bar with rate and time left."""
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(steps, total=total, desc=label, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=1)
    return bar
